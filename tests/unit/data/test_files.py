"""Which files a path names, gzip files among them, and where their images lie."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc

import pytest
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.config.values import ConfigError
from nvlm.data.look import check_data
from nvlm.data.record import BadRecord
from nvlm.data.sources import gzipped
from nvlm.data.sources.json_file import JsonFile
from nvlm.data.sources.json_rows import records_of
from nvlm.data.sources.registry import build_records

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An empty cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "nvlm"


def row(name: str, **keys) -> dict:
    return {"id": name, "messages": TALK, **keys}


def lines(*names: str) -> bytes:
    return "".join(json.dumps(row(name)) + "\n" for name in names).encode()


def names_of(path) -> list[str]:
    records = records_of(str(path))
    return [records[i].id for i in range(len(records))]


@pytest.fixture
def folder(tmp_path):
    """Files of all kinds in a folder and in one below it, links and hidden ones among them."""
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "b.jsonl").write_bytes(lines("b1", "b2"))
    (tmp_path / "d" / "a.json").write_text(json.dumps([row("a1"), row("a2")]))
    (tmp_path / "d" / "c.jsonl.gz").write_bytes(gzip.compress(lines("c1")))
    (tmp_path / "d" / "sub" / "d.json.gz").write_bytes(gzip.compress(json.dumps([row("d1")]).encode()))
    (tmp_path / "far.jsonl").write_bytes(lines("far"))
    (tmp_path / "d" / "e.jsonl").symlink_to(tmp_path / "far.jsonl")
    (tmp_path / "d" / "readme.txt").write_text("no records")
    (tmp_path / "d" / ".e.jsonl.swp.jsonl").write_bytes(b"no records")
    (tmp_path / "d" / ".checkpoints").mkdir()
    (tmp_path / "d" / ".checkpoints" / "b.jsonl").write_bytes(lines("old"))
    (tmp_path / "d" / "folder.jsonl").mkdir()
    return tmp_path


def test_a_folder_and_a_glob_name_files_of_all_kinds_in_the_order_of_their_names(folder):
    assert names_of(folder / "d") == ["a1", "a2", "b1", "b2", "c1", "far", "d1"]
    assert names_of(folder / "d" / "[a-c].json*") == ["a1", "a2", "b1", "b2", "c1"]
    assert names_of(folder / "**" / "*.gz") == ["c1", "d1"]
    (folder / "d" / "[x].jsonl").write_bytes(lines("x"))  # the name of a file that is there is no pattern
    assert names_of(folder / "d" / "[x].jsonl") == ["x"]


def test_records_keep_the_names_of_their_files(folder):
    records = records_of(str(folder / "d"))
    assert [records.name(i) for i in range(len(records))] == [
        *("a.json[0]", "a.json[1]", "b.jsonl:1", "b.jsonl:2", "c.jsonl.gz:1", "e.jsonl:1", "d.json.gz[0]")
    ]
    assert [path.name for path in records.files] == ["a.json", "b.jsonl", "c.jsonl.gz", "e.jsonl", "d.json.gz"]


@pytest.mark.parametrize("path", ["d/sub/*.jsonl", "empty"])
def test_a_path_without_files_is_refused(folder, path):
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match="^data.path: got .*, where there is none, expected .* Fix: data.path=FILE"):
        records_of(str(folder / path))


def test_images_lie_beside_the_files_below_a_root_or_behind_a_link_below_it(tmp_path, configured):
    for place in ("rows", "pictures", "disk"):
        (tmp_path / place).mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "disk" / "a.png")
    (tmp_path / "rows" / "r.jsonl").write_text(json.dumps(row("r", images=["a.png"])) + "\n")
    (tmp_path / "pictures" / "a.png").symlink_to("../pictures/b.png")
    (tmp_path / "pictures" / "b.png").write_bytes((tmp_path / "disk" / "a.png").read_bytes())

    def images(path: str, *more: str):
        config = configured("data=jsonl", f"data.path={tmp_path / path}", *more)
        check_data(config, placement_rule(config.arch.name))
        return build_records(config.data, seed=0)[0].images

    for path in ("rows", "rows/*.jsonl", "rows/r.jsonl"):
        found = images(path, f"data.root={tmp_path / 'pictures'}")
        assert found == [tmp_path / "pictures" / "b.png"]  # a link that stays below the root
        with pytest.raises(ConfigError, match="a.png: no such image.*data.root=DIR"):
            images(path)
    (tmp_path / "rows" / "a.png").symlink_to(tmp_path / "disk" / "a.png")
    with pytest.raises(ConfigError, match="a.png is a link to .*set data.root to the folder of the images"):
        images("rows/r.jsonl")
    (tmp_path / "named").symlink_to(tmp_path / "disk")
    assert images("rows", f"data.root={tmp_path / 'named'}") == [tmp_path / "disk" / "a.png"]


@pytest.mark.parametrize("content", [lines("é", "b", "c"), json.dumps([row("é"), row("b"), row("c")]).encode()])
def test_a_gzip_file_gives_the_records_of_what_it_holds(tmp_path, content, cache, configured):
    half = len(content) // 2
    (tmp_path / "r.json").write_bytes(content)
    (tmp_path / "r.gz").write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))  # two members
    plain, packed = records_of(str(tmp_path / "r.json")), records_of(str(tmp_path / "r.gz"))
    for index in (2, 0, 1):
        assert plain[index] == packed[index]
        assert packed.name(index) == plain.name(index).replace("r.json", "r.gz")
    assert packed.files == (tmp_path / "r.gz",)
    config = configured("data=jsonl", f"data.path={tmp_path / 'r.gz'}")
    (unpacked,) = (path for path in cache.iterdir() if path.name != "lock")
    unpacked.unlink()
    check_data(config, placement_rule(config.arch.name))
    assert not unpacked.exists()  # to look at its first records, it is not unpacked


def test_a_gzip_file_is_unpacked_once_and_again_if_it_changes(tmp_path, cache):
    path = tmp_path / "r.jsonl.gz"
    path.write_bytes(gzip.compress(lines("a")))
    assert names_of(path) == ["a"]
    (first,) = (file for file in cache.iterdir() if file.name != "lock")
    before = first.stat().st_mtime_ns, first.stat().st_ino
    assert names_of(path) == ["a"]
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == before
    path.write_bytes(gzip.compress(lines("b", "c")))
    assert names_of(path) == ["b", "c"]


DAMAGES = {
    "cut short": lambda data: data[:-20],
    "without its end": lambda data: data[:-4],
    "a wrong checksum": lambda data: data[:-8] + bytes([data[-8] ^ 1]) + data[-7:],
    "a changed byte": lambda data: data[: len(data) // 2] + b"\xff\xff\xff" + data[len(data) // 2 + 3 :],
    "no header": lambda data: data[:3],
    "more after its end": lambda data: data + b"more",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_gzip_file_is_refused_and_leaves_nothing_behind(tmp_path, cache, damage):
    (tmp_path / "r.jsonl.gz").write_bytes(damage(gzip.compress(lines(*map(str, range(400))))))
    with pytest.raises(ConfigError, match="^data.path: got .*r.jsonl.gz, a damaged gzip file .* Fix: write it again"):
        records_of(str(tmp_path / "r.jsonl.gz"))
    assert not cache.exists() or {path.name for path in cache.iterdir()} <= {"lock"}


def test_unpacking_takes_little_memory_and_a_full_disk_is_said(tmp_path, monkeypatch, cache):
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines(*(str(n) * 1000 for n in range(3000))), compresslevel=1))
    tracemalloc.start()
    records = records_of(str(tmp_path / "r.jsonl.gz"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert records[2999].id and sum(file.stat().st_size for file in cache.iterdir()) > 9_000_000 and peak < 5_000_000

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gzipped.shutil, "copyfileobj", full)
    os.utime(tmp_path / "r.jsonl.gz", (0, 0))
    with pytest.raises(
        ConfigError, match="cannot be unpacked into .*No space left on device.*gunzip .*XDG_CACHE_HOME=DIR"
    ):
        records_of(str(tmp_path / "r.jsonl.gz"))
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_a_line_of_a_gzip_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines("a") + b"{\n"))
    records = records_of(str(tmp_path / "r.jsonl.gz"))
    with pytest.raises(BadRecord, match="not JSON"):
        records[1]
    assert records.name(1) == "r.jsonl.gz:2"


def test_a_line_of_many_megabytes_is_skipped_and_named(tmp_path):
    with open(tmp_path / "x.jsonl", "wb") as file:
        file.write(b'{"text": "a"}\n')
        file.truncate(300 << 20)  # zeros, which take no room on the disk
    rows = JsonFile(str(tmp_path / "x.jsonl"), "data.path")
    assert rows[0] == {"text": "a"}
    with pytest.raises(BadRecord, match="299 MiB of JSON, more than 256"):
        rows[1]
