"""Tars in WebDataset's layout: samples through energon's index or the same one built here; every fault has its rule."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.config.values import ConfigError
from nvlm.data.look import check_data
from nvlm.data.outline import build_processor
from nvlm.data.record import BadRecord
from nvlm.data.samples import encode
from nvlm.data.sources import energon, tars
from nvlm.data.sources.recent import Recent
from nvlm.data.sources.registry import build_records
from nvlm.data.sources.tar_index import offsets_of, split_name
from nvlm.data.sources.tars import TarFile, row_of, rows_of

TURNS = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nvlm"


def picture(width: int = 60) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 40)).save(file, "png")
    return file.getvalue()


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    one = tarfile.TarInfo(name)
    one.size = len(data)
    for field, value in fields.items():
        setattr(one, field, value)
    return one, data


def samples(count: int, first: int = 0) -> list:
    """Members of samples whose image is 10 + their number px wide."""
    return [
        member(f"{n:05}.{end}", data)
        for n in range(first, first + count)
        for end, data in (("png", picture(10 + n)), ("json", json.dumps({"messages": TURNS}).encode()))
    ]


def write(path: Path, members: list, **options) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w", **options) as tar:
        for one, data in members:
            tar.addfile(one, io.BytesIO(data))
    return path


def energon_index(path: Path) -> bytes:
    """The index as energon's documents state it, from Python's own list of members: N + 1 little-endian uint64."""
    starts, last, end = [], None, 0
    with tarfile.open(path) as tar:
        for one in tar.getmembers():
            end = one.offset_data + (one.size + 511) // 512 * 512
            folder, _, base = one.name.rpartition("/")
            if one.isfile() and "." in base and (folder, base.split(".")[0]) != last:
                starts.append(one.offset)
                last = folder, base.split(".")[0]
    return struct.pack(f"<{len(starts) + 1}Q", *starts, end)


def opened(path: Path) -> TarFile:
    return TarFile(path, "data.path", Recent(4))


LONG = "a folder with a name that is far too long for the hundred bytes of a plain header/" * 2


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_that_is_built_is_energon_s(tmp_path, format, cache):
    long = [] if format == tarfile.USTAR_FORMAT else [member(f"{LONG}9.txt", b"x"), member(f"{LONG}9.png", picture())]
    folders = [member("./d", type=tarfile.DIRTYPE), member("./d/1.a.png", b"x"), member("./d/1.json", b"{}")]
    path = write(tmp_path / "a.tar", [*samples(3), *folders, *long, member("e/1.json", b"{}")], format=format)
    found = offsets_of(path, "data.path")
    beside = tmp_path / "a.tar.idx"
    assert beside.read_bytes() == energon_index(path) and len(found) - 1 == 5 + bool(long)
    assert list(cache.iterdir()) == [cache / "lock"]
    row = opened(path)[3]
    assert row == {"id": "./d/1", "images": [b"x"]}


def test_an_index_that_is_there_is_read_and_the_tar_is_not_scanned(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", samples(4))
    (tmp_path / "a.tar.idx").write_bytes(energon_index(path))
    monkeypatch.setattr("nvlm.data.sources.tar_index._scanned", lambda *_: pytest.fail("scanned"))
    found = opened(path)
    assert len(found) == 4
    assert found[2] == {"id": "00002", "messages": TURNS, "images": [picture(12)]}


def test_where_the_folder_cannot_be_written_the_index_is_in_the_cache_or_nowhere(tmp_path, monkeypatch, cache):
    path = write(tmp_path / "a.tar", samples(4))
    make_once = tars.offsets_of.__globals__["make_once"]
    refused = {tmp_path}

    def only_in_cache(target, write):
        if target.parent in refused:
            raise PermissionError(13, "Permission denied")
        make_once(target, write)

    monkeypatch.setattr("nvlm.data.sources.tar_index.make_once", only_in_cache)
    expected = np.frombuffer(energon_index(path), "<u8")
    assert (offsets_of(path, "k") == expected).all() and len(list(cache.glob("*.tar.idx"))) == 1
    write(path, samples(5))  # a changed tar has another index in the cache
    assert len(offsets_of(path, "k")) == 6
    refused.add(cache)
    write(path, samples(6))
    assert len(offsets_of(path, "k")) == 7 and not (tmp_path / "a.tar.idx").exists()


def test_only_headers_are_read_to_build_an_index(tmp_path):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:  # 40 GB, of which the file system stores only the headers
        for n in range(4):
            one = tarfile.TarInfo(f"{n}.jpg")
            one.size = 10 << 30
            file.write(one.tobuf(tarfile.GNU_FORMAT))
            file.seek(one.size, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    tracemalloc.start()
    found = opened(path)
    assert len(found) == 4 and tracemalloc.get_traced_memory()[1] < 1_000_000
    with pytest.raises(BadRecord, match="a sample of 10240 MiB, more than 256"):
        found[1]
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_samples_are_found_in_any_order_over_files_with_few_of_them_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_OPEN", 2)
    for number in range(5):
        write(tmp_path / f"{number}.tar", samples(6, first=6 * number))
    found = rows_of(str(tmp_path), "data.path")
    order = list(range(30))
    random.Random(1).shuffle(order)
    for index in order:
        assert found[index] == {"id": f"{index:05}", "messages": TURNS, "images": [picture(10 + index)]}
    assert found.name(8) == "1.tar[2]" and len(found.parts[0].opened.values) == 2
    copy = pickle.loads(pickle.dumps(found))
    assert copy[29] == found[29] and len(copy.parts[0].opened.values) == 1


def test_a_tar_trains_and_its_images_are_those_of_the_sample(tmp_path, configured):
    path = write(tmp_path / "a.tar", samples(3))
    config = configured("data=webdataset", f"data.path={path}", "arch=decoder")
    check_data(config, placement_rule("decoder"))
    records = build_records(config.data, seed=0)
    assert (records[1].id, records.name(1), records[1].images) == ("00001", "a.tar[1]", [picture(11)])
    assert len(encode(records[1], build_processor(config, placement_rule("decoder"))).tile_tokens)


def test_a_txt_is_a_caption_where_the_task_says_so(tmp_path, configured):
    path = write(tmp_path / "a.tar", [member("1.png", picture()), member("1.txt", "\ufeffA <image> of é.".encode())])
    record = build_records(configured("data=webdataset", "data.task=caption", f"data.path={path}").data, seed=0)[0]
    assert record.messages[1]["content"] == "A \\<image> of é." and record.images == [picture()]
    with pytest.raises(ConfigError, match="a txt without messages in a json: data.task=caption makes a conversation"):
        check_data(configured("data=webdataset", f"data.path={path}"), placement_rule("hybrid"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("000.jpg", ("000", "jpg")),
        ("a.b/000.left.JPG", ("a.b/000", "left.jpg")),
        ("./000.json", ("./000", "json")),
        ("000", None),
        (".hidden", None),
        ("d/.hidden.jpg", None),
        ("__meta__/000.json", None),
    ],
)
def test_a_key_ends_at_the_first_dot_of_the_base_name(name, parts):
    assert split_name(name) == parts


def test_images_are_in_the_order_of_their_names_or_in_the_json_s(tmp_path):
    parts = {name: name.encode() for name in ("10.png", "jpg", "2.png", "b.webp", "npy")}
    assert row_of("d/7", parts)["images"] == [b"2.png", b"10.png", b"b.webp", b"jpg"]

    def named(**keys):
        return row_of("d/7", parts | {"json": json.dumps(keys).encode()})["images"]

    assert named(images=["b.webp", "7.2.png", "x/7.10.PNG"]) == [b"b.webp", b"2.png", b"10.png"]
    assert named(image="jpg") == [b"jpg"]
    with pytest.raises(BadRecord, match="image '3.png' is not in the sample, which has 2.png, 10.png, b.webp, jpg"):
        named(images=["3.png"])


def test_no_name_in_a_tar_or_its_json_is_a_path(tmp_path, configured):
    (tmp_path / "secret.png").write_bytes(picture())
    names = ("secret.png", "../secret.png", str(tmp_path / "secret.png"))
    rows = [{"messages": TURNS, "images": [name]} for name in names]
    path = write(tmp_path / "a.tar", [member(f"{n}.json", json.dumps(row).encode()) for n, row in enumerate(rows)])
    records = build_records(configured("data=webdataset", f"data.path={path}").data, seed=0)
    for index in range(3):
        with pytest.raises(BadRecord, match="is not in the sample: data.root=DIR|leaves the data folder"):
            records[index]
    write(tmp_path / "b.tar", [member("../../up.png", picture()), member("/etc/up.png", picture())])
    before = sorted(tmp_path.parent.rglob("*"))
    assert [row["id"] for row in (rows_of(str(tmp_path / "b.tar"), "k")[n] for n in range(2))] == [
        "../../up",
        "/etc/up",
    ]
    assert {file.name for file in {*tmp_path.parent.rglob("*")} - {*before}} == {"b.tar.idx"}
    named = build_records(configured("data=webdataset", f"data.path={path}", f"data.root={tmp_path}").data, seed=0)
    assert named[0].images == [tmp_path / "secret.png"]


FAULTS = {
    "link": (
        [member("1.json", b"{}"), member("1.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        "is a link, a dev",
    ),
    "hard link": (
        [member("1.json", b"{}"), member("1.png", type=tarfile.LNKTYPE, linkname="1.json")],
        "is a link, a d",
    ),
    "device": ([member("1.json", b"{}"), member("1.png", type=tarfile.CHRTYPE)], "is a link, a device"),
    "twice": ([member("1.json", b"{}"), member("1.png", b"a"), member("1.PNG", b"b")], "two members 'png' of '1'"),
    "sound": ([member("1.json", b"{}"), member("1.mp3", b"a")], "member 'mp3' of '1': sound is not supported"),
    "no json": ([member("1.json", b"{")], "not JSON"),
    "a list": ([member("1.json", b"[1]")], "the json of '1' is no object"),
    "bad text": ([member("1.txt", b"\xff")], "the txt of '1' is not UTF-8 at byte 0"),
}


@pytest.mark.parametrize(("faulty", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_bad_sample_is_named_and_its_neighbours_are_read(tmp_path, faulty, reason):
    found = opened(write(tmp_path / "a.tar", [*samples(1), *faulty, *samples(1, first=2)]))
    assert len(found) == 3 and found[0]["messages"] == found[2]["messages"] == TURNS
    with pytest.raises(BadRecord, match=reason):
        found[1]


def half(data: bytes) -> bytes:
    return data[: len(data) // 2 + 100]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"", "which is empty"),
        (lambda data: data[:300], "which is of another kind, or damaged at its start"),
        (lambda data: b"\x1f\x8b" + data, "a gzip file, .* Fix: unpack it: gunzip"),
        (lambda data: b"PK\x03\x04" + bytes(600), "which is of another kind"),
        (half, "damaged or cut short after [1-8] samples"),
        (lambda data: data[:1024] + b"\xee" * 512 + data[1536:], "damaged or cut short after 1 samples .no header at"),
        (lambda data: bytes(10240), "which has no samples"),
    ],
)
def test_a_tar_that_is_damaged_or_empty_is_refused_before_the_run(tmp_path, configured, change, reason):
    path = write(tmp_path / "a.tar", samples(9))
    path.write_bytes(change(path.read_bytes()))
    config = configured("data=webdataset", f"data.path={path}")
    for check in (lambda: check_data(config, placement_rule("hybrid")), lambda: build_records(config.data, seed=0)):
        with pytest.raises(ConfigError, match=f"^data.path: got .*a.tar, {reason}"):
            check()
    assert "no samples" in reason or not (tmp_path / "a.tar.idx").exists()


def test_an_empty_tar_beside_others_holds_no_record(tmp_path):
    write(tmp_path / "a.tar", [])
    write(tmp_path / "b.tar", samples(2))
    assert [len(part) for part in rows_of(str(tmp_path), "k").parts] == [0, 2]


OTHERS = {
    "longer tar": lambda path: energon_index(write(path.with_name("o.tar"), samples(30))),
    "shorter tar": lambda path: energon_index(write(path.with_name("o.tar"), samples(2))),
    "other members": lambda path: energon_index(
        write(path.with_name("o.tar"), [member(f"{n}.bin", bytes(700)) for n in range(9)])
    ),
    "no index": lambda path: b"text",
    "empty": lambda path: b"",
    "backwards": lambda path: energon_index(path)[8:16] + energon_index(path),
    "huge": lambda path: energon_index(path)[:-8] + b"\xff" * 8,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_the_index_of_another_tar_is_noticed(tmp_path, other):
    path = write(tmp_path / "a.tar", samples(9))
    index = path.with_name("a.tar.idx")
    index.write_bytes(other(path))
    with pytest.raises(ConfigError, match=f"^k: got .*a.tar with .*Fix: .*rm {index}"):
        rows_of(str(path), "k")
    index.unlink()
    assert len(rows_of(str(path), "k")) == 9


def test_an_index_that_differs_between_its_ends_spoils_only_the_samples_there(tmp_path):
    path = write(tmp_path / "a.tar", samples(9))
    good = np.frombuffer(energon_index(path), "<u8").copy()
    good[2] += 512  # within sample 2, at bytes of its image
    path.with_name("a.tar.idx").write_bytes(np.delete(good, 6).tobytes())
    found = opened(path)
    reasons = {}
    for index in range(len(found)):
        try:
            found[index]
        except BadRecord as reason:
            reasons[index] = str(reason)
    assert sorted(reasons) == [1, 2, 5]
    assert "the index of another tar" in reasons[2] and "members '00005' and '00006' in one sample" in reasons[5]


def test_a_tar_that_is_cut_while_it_is_read_makes_bad_records(tmp_path):
    path = write(tmp_path / "a.tar", samples(9))
    found = opened(path)
    os.truncate(path, int(found.offsets[4]) + 700)
    assert found[3]["id"] == "00003"
    for index in (4, 8):
        with pytest.raises(BadRecord, match="cut short within this sample"):
            found[index]


def prepared(folder: Path) -> Path:
    """A folder as `energon prepare` leaves it."""
    for number, name in enumerate(("s_000", "s_001", "s_002", "v_0")):
        path = write(folder / "shards" / f"{name}.tar", samples(2, first=2 * number))
        path.with_suffix(".tar.idx").write_bytes(energon_index(path))
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta" / "split.yaml").write_text(
        "exclude: [shards/s_001.tar]\n"
        "split_parts: {train: ['shards/s_{000..002}.tar'], val: ['shards/v_0.tar'], test: []}\n"
    )
    return folder


def test_energon_s_folder_is_opened_by_its_splits(tmp_path, configured):
    folder = prepared(tmp_path / "d")
    data = configured("data=webdataset", f"data.path={folder}", f"data.heldout_path={folder}").data
    for heldout, ids in ((False, ["00000", "00001", "00004", "00005"]), (True, ["00006", "00007"])):
        records = build_records(data, seed=0, heldout=heldout)
        assert [records[n].id for n in range(len(records))] == ids
    assert len(rows_of(f"{folder}/shards", "data.path")) == 8


def test_names_in_braces_are_those_of_the_shell():
    assert list(energon.expanded("a_{08..11}.tar")) == ["a_08.tar", "a_09.tar", "a_10.tar", "a_11.tar"]
    assert list(energon.expanded("{a,b}/{0..1}.tar")) == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert list(energon.expanded("plain.tar")) == ["plain.tar"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "split.yaml, which cannot be read"),
        ("split_parts: [a]", "split.yaml, which cannot be read"),
        ("split_parts: {val: [a.tar]}", "no tars of train in its folder"),
        ("split_parts: {train: [../a.tar]}", "no tars of train in its folder"),
        ("split_parts: {train: [/etc/a.tar]}", "no tars of train in its folder"),
        ("split_parts: {train: [shards/gone.tar]}", "gone.tar.: No such file"),
        ("{split_parts: {train: [a.tar]}, exclude: [a.tar/0001]}", "single samples to exclude, such as a.tar/0001"),
    ],
)
def test_splits_that_cannot_be_followed_are_refused(tmp_path, text, reason):
    folder = prepared(tmp_path / "d")
    (folder / ".nv-meta" / "split.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"^data.path: got .*{reason}"):
        rows_of(str(folder), "data.path")


def test_mutated_tars_never_raise_anything_else(tmp_path):
    whole = bytearray(write(tmp_path / "whole.tar", samples(4), format=tarfile.PAX_FORMAT).read_bytes())
    index = energon_index(tmp_path / "whole.tar")
    path, draw = tmp_path / "a.tar", random.Random(0)
    for number in range(300):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3, 20))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice((len(data), draw.randrange(len(data))))])
        path.with_name("a.tar.idx").unlink(missing_ok=True)
        if number % 2:
            path.with_name("a.tar.idx").write_bytes(index)
        try:
            found = opened(path)
        except ConfigError:
            continue
        for place in range(len(found)):
            try:
                found[place]
            except BadRecord:
                pass


@pytest.mark.timeout(20)
def test_an_index_that_is_no_regular_file_or_far_too_long_is_not_read(tmp_path):
    path = write(tmp_path / "a.tar", samples(2))
    good, index = offsets_of(path, "data.path"), path.with_suffix(".tar.idx")
    index.unlink()
    os.mkfifo(index)
    assert (offsets_of(path, "data.path") == good).all()
    index.unlink()
    index.symlink_to("/dev/zero")
    assert (offsets_of(path, "data.path") == good).all()
    index.unlink()
    with open(index, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="an index that is not its own"):
        offsets_of(path, "data.path")


def test_offsets_above_63_bits_are_noticed(tmp_path):
    path = write(tmp_path / "a.tar", samples(4))
    good = energon_index(path)
    wrapping = struct.pack("<4Q", 0, 2**62, 2**63, 2**63 + 2**62)  # as signed numbers, and their differences too
    path.with_suffix(".tar.idx").write_bytes(wrapping + good[8:])
    with pytest.raises(ConfigError, match="cut short, or another tar"):
        offsets_of(path, "data.path")


@pytest.mark.timeout(20)
def test_the_map_of_a_file_with_holes_is_not_read_to_its_end(tmp_path):
    numbers = b"1000000\n" + b"1\n" * 1_000_000
    holes = member("0.png", numbers, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    path = write(tmp_path / "a.tar", [*samples(1), holes], format=tarfile.PAX_FORMAT)
    with pytest.raises(ConfigError, match="after 1 samples .a header that is too long"):
        offsets_of(path, "data.path")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "names",
    ["['{0..999999}{0..999999}.tar']", f"['{{0..{'9' * 5000}}}.tar']", f"['{{{'0' * 10**5}..1}}.tar']", "[[a.tar]]"],
    ids=["product", "number", "width", "list"],
)
def test_splits_that_stand_for_too_many_names_or_none_are_refused(tmp_path, names):
    folder = prepared(tmp_path / "d")
    (folder / ".nv-meta" / "split.yaml").write_text(f"split_parts: {{train: {names}}}")
    with pytest.raises(ConfigError, match="cannot be read|No such file|too long|more than 100,000 names"):
        rows_of(str(folder), "data.path")
