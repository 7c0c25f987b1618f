"""Object storage by a local server of the S3 protocol: every source reads by ranges, and nothing leaves the root."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.config.values import ConfigError
from nvlm.data import remote
from nvlm.data.images import decode_image, image_path, image_size
from nvlm.data.index.build import alone, prepare
from nvlm.data.index.opened import open_records
from nvlm.data.index.walk import Walk
from nvlm.data.look import check_data
from nvlm.data.measure import measure
from nvlm.data.outline import build_processor
from nvlm.data.record import BadRecord
from nvlm.data.remote import Remote, place
from nvlm.data.samples import encode
from nvlm.data.sources import parquet, tars
from nvlm.data.sources.files import files_of, image_root
from nvlm.data.sources.registry import build_records
from nvlm.inputs.identity import of_file
from tests.object_store import served

TURNS = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]
SECRET = "hidden-key-of-the-test"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with served(root) as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{found.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIDTEST")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        remote._filesystem.cache_clear()
        yield found
    remote._filesystem.cache_clear()


@pytest.fixture
def folder(store, request) -> Path:
    """A folder of the bucket, for one test."""
    found = store.root / "bucket" / request.node.name.partition("[")[0]
    found.mkdir()
    store.requests.clear()
    return found


def url(path: Path) -> str:
    return f"s3://{path.relative_to(next(p for p in path.parents if p.name == 'bucket').parent)}"


def picture(width: int = 60) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, 40), 99).save(file, "png")
    return file.getvalue()


def write_parquet(path: Path, count: int) -> Path:
    rows = [{"id": f"r{n}", "messages": TURNS, "images": [{"bytes": picture(90 + n)}]} for n in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    return path


def write_tar(path: Path, count: int) -> Path:
    with tarfile.open(path, "w") as tar:
        for n in range(count):
            for end, data in (("png", picture(90 + n)), ("json", json.dumps({"messages": TURNS}).encode())):
                one = tarfile.TarInfo(f"{n:03}.{end}")
                one.size = len(data)
                tar.addfile(one, io.BytesIO(data))
    return path


def test_parquet_is_read_by_ranges_over_files_and_pages_of_a_listing(folder, store):
    for name in ("a", "b", "c", "d", "e"):
        write_parquet(folder / f"{name}.parquet", 20)
    (folder / "note.txt").write_text("no table")
    found = parquet.rows_of(url(folder), "data.path")
    assert len(found) == 100 and [file.name for file in found.files] == [f"{name}.parquet" for name in "abcde"]
    local = parquet.rows_of(str(folder), "data.path")
    store.requests.clear()
    assert found[33] == local[33] and found.name(33) == "b.parquet[13]"
    size = (folder / "b.parquet").stat().st_size
    spans = store.gets("b.parquet")
    assert spans and all(span for span, _ in spans) and sum(sent for _, sent in spans) < size
    assert all(signed for *_, signed in store.requests)
    assert len(parquet.rows_of(f"{url(folder)}/[ab]*.parquet", "data.path")) == 40


def test_a_sample_of_a_tar_is_one_request_and_the_index_is_built_in_the_cache(folder, store):
    write_tar(folder / "a.tar", 8)
    expected = tars.rows_of(str(folder / "a.tar"), "k")
    index = (folder / "a.tar.idx").read_bytes()
    found = tars.rows_of(url(folder / "a.tar"), "k")  # with the index beside it
    found[0]
    for index_too in (True, False):
        if not index_too:
            (folder / "a.tar.idx").unlink()
            found = tars.rows_of(url(folder / "a.tar"), "k")
            found[0]
        store.requests.clear()
        assert found[5] == expected[5]
        ((span, sent),) = store.gets("a.tar")
        start, end = (int(offset) for offset in expected.parts[0].offsets[5:7])
        assert (span, sent) == (f"bytes={start}-{end - 1}", end - start)
    kept = list((store.root / "cache" / "nvlm").glob("*.tar.idx"))
    assert [file.read_bytes() for file in kept] == [index]
    assert {method for method, *_ in store.requests} <= {"GET", "HEAD"} and not (folder / "a.tar.idx").exists()


def test_energon_s_splits_are_followed(folder):
    for name in ("t0", "t1", "v0"):
        write_tar(folder / f"{name}.tar", 2)
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta" / "split.yaml").write_text("split_parts: {train: ['t{0..1}.tar'], val: [v0.tar]}")
    assert [len(tars.rows_of(url(folder), key)) for key in ("data.path", "data.heldout_path")] == [4, 2]


def test_lines_are_copied_once_and_their_images_are_read_below_the_root(folder, store, configured):
    (folder / "img").mkdir()
    (folder / "img" / "a b.png").write_bytes(picture(333))
    rows = [{"messages": TURNS, "images": [path]} for path in ("img/a b.png", "img/../img/a b.png", "gone.png")]
    rows += [{"messages": [], "note": "x" * 3000}] * 1000
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configured("data=jsonl", f"data.path={url(folder)}/r.jsonl", "arch=decoder")
    check_data(config, placement_rule("decoder"))
    records = build_records(config.data, seed=0)
    build_records(config.data, seed=0)
    assert sum(sent for _, sent in store.gets("r.jsonl")) < 1.5 * (folder / "r.jsonl").stat().st_size
    assert records.name(1) == "r.jsonl:2" and str(records.files[0]) == f"{url(folder)}/r.jsonl"
    store.requests.clear()
    for record in (records[0], records[1]):
        assert image_size(record.images[0], 10**6) == (333, 40)
        assert decode_image(record.images[0], 10**6).size == (333, 40)
    processor = build_processor(config, placement_rule("decoder"))
    assert len(encode(records[0], processor).tile_tokens)
    with pytest.raises(BadRecord, match="gone.png: no such image"):
        encode(records[2], processor)
    elsewhere = configured("data=jsonl", f"data.path={url(folder)}/r.jsonl", f"data.root={folder}", "arch=decoder")
    assert build_records(elsewhere.data, seed=0)[0].images == [folder / "img" / "a b.png"]


@pytest.mark.parametrize(
    "path", ["../other/a.png", "/bucket/a.png", "a/../../b.png", "..", "s3://bucket/a.png", "h://x"]
)
def test_an_image_s_path_stays_below_the_root_and_is_no_url(path):
    with pytest.raises(BadRecord, match="leaves the data folder"):
        image_path(Remote("s3://bucket/folder"), path)


@pytest.mark.parametrize("name", ["a.png", "b/../a.png", "./a.png"])
def test_an_image_s_path_is_below_the_root(name):
    assert image_path(Remote("s3://bucket/folder"), name) == Remote("s3://bucket/folder/a.png")


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("s3://b/d/r.jsonl", "s3://b/d"),
        ("s3://b/d/*.parquet", "s3://b/d"),
        ("s3://b/*/x/r.jsonl", "s3://b"),
        ("s3://b/d", "s3://b/d"),
        ("s3://b.c", "s3://b.c"),
    ],
)
def test_the_root_is_the_folder_of_the_files(path, root):
    assert image_root(path, None, "data.path") == Remote(root)


def row_in_child(rows, index: int):
    return rows[index]


def test_a_forked_worker_reads_over_a_connection_of_its_own(folder):
    write_parquet(folder / "a.parquet", 12)
    write_tar(folder / "a.tar", 4)
    table, tar = parquet.rows_of(url(folder / "a.parquet"), "k"), tars.rows_of(url(folder / "a.tar"), "k")
    expected = table[11], tar[3]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        jobs = [pool.apply_async(row_in_child, job) for job in ((table, 11), (tar, 3))]
        assert tuple(job.get(timeout=30) for job in jobs) == expected


def test_an_object_is_identified_by_size_and_samples_without_reading_all_of_it(folder, store):
    path = folder / "a.bin"
    path.write_bytes(os.urandom(1 << 20))
    before = of_file(Remote(url(path)))
    assert before.bytes == 1 << 20 and sum(sent for _, sent in store.gets("a.bin")) < 1 << 18
    assert of_file(Remote(url(path))).same(before)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert not of_file(Remote(url(path))).same(before)
    (folder / "small").write_bytes(b"x")
    assert of_file(Remote(url(folder / "small"))).bytes == 1


@pytest.mark.parametrize(
    "path",
    ["s3://AKIDTEST:hidden@bucket/d", "s3://bucket/d?secret_key=hidden", "https://h/a.tar?X-Amz-Signature=hidden"],
)
def test_a_url_with_credentials_is_refused_and_not_printed(path, configured):
    for source in ("parquet", "webdataset", "jsonl", "text"):
        data = configured(f"data={source}", "data.path=x.jsonl").data
        with pytest.raises(ConfigError, match="^data.path: got a URL with credentials or settings") as caught:
            build_records(replace(data, source=replace(data.source, path=path)), seed=0)
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("source", ["parquet", "webdataset", "jsonl"])
def test_what_is_not_there_is_refused_by_its_url(source, store, configured):
    end = {"parquet": "parquet", "webdataset": "tar", "jsonl": "jsonl"}[source]
    for path in (f"s3://bucket/gone/a.{end}", f"s3://bucket/gone/*.{end}", f"s3://nobucket/a.{end}"):
        config = configured(f"data={source}", f"data.path={path}")
        with pytest.raises(ConfigError, match="^data.path: got .*s3://") as caught:
            check_data(config, placement_rule("hybrid"))
        assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_a_scheme_that_nothing_reads_is_refused(configured):
    with pytest.raises(ConfigError, match="nosuch:// cannot be read: "):
        files_of("nosuch://host/*.tar", (".tar",), "data.path")


def test_fsspec_reads_all_other_schemes(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for name in ("a.tar", "b.tar"):
        memory.pipe(f"/bucket/d/{name}", write_tar(tmp_path / name, 3).read_bytes())
    found = tars.rows_of("memory://bucket/d/*.tar", "k")
    assert len(found) == 6 and found[4] == tars.rows_of(str(tmp_path / "b.tar"), "k")[1]


def test_a_remote_file_has_the_parts_of_a_path():
    one = Remote("s3://b/d/x.tar")
    assert (one.name, str(one.parent), str(one.with_suffix(".tar.idx"))) == ("x.tar", "s3://b/d", "s3://b/d/x.tar.idx")
    assert place("d/x.tar", "k") == Path("d/x.tar") and str(Remote("s3://b") / "x") == "s3://b/x"


def test_an_index_of_files_in_object_storage_gives_the_same_records_and_notices_changes(folder, tmp_path, configured):
    lines = [json.dumps({"messages": TURNS, "images": [f"{n}.png"]}) for n in range(5)]
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture(50 + number))
    (folder / "r.jsonl").write_text("\n".join(lines))
    config = configured("data=jsonl", f"data.path={url(folder)}/*.jsonl", f"data.index={tmp_path}/index")
    processor = build_processor(config, placement_rule(config.arch.name))
    walk = Walk(config.data.source, "", config.seed, processor, tmp_path / "partial")
    with alone(tmp_path / "index"):
        assert prepare(walk, tmp_path / "index" / "records", 1, lambda done, whole: None).bad == 1
    records, index = open_records(config.data, config.seed, processor)
    plain = build_records(config.data, config.seed)
    assert [records[n].images for n in range(4)] == [plain[n].images for n in range(4)] and len(records) == 5
    assert [index.measure(n) for n in range(4)] == [measure(plain[n], processor) for n in range(4)]
    (folder / "r.jsonl").write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(ConfigError, match="an index of r.jsonl when it had"):
        open_records(config.data, config.seed, processor)


def test_the_url_of_a_local_file_is_refused_with_its_path(configured, tmp_path):
    (tmp_path / "x.jsonl").write_text("{}")
    words = {"path": ["data.path=file:///d/x.jsonl"], "root": [f"data.path={tmp_path}/x.jsonl", "data.root=file:///d"]}
    for key in words:
        with pytest.raises(ConfigError, match=rf"^data.{key}: got file:///d.*, expected a path. Fix: data.{key}=/d"):
            build_records(configured("data=jsonl", *words[key]).data, seed=0)


def test_hidden_files_are_left_out_as_on_a_disk(folder):
    for name in ("a.jsonl", ".b.jsonl", ".old/c.jsonl", "sub/d.jsonl", "sub/.e/f.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    for pattern in ("", "/*.jsonl", "/**/*.jsonl", "/.*", "/.old/*", "/*/*.jsonl"):
        found, local = (files_of(f"{base}{pattern}", (".jsonl",), "k") for base in (url(folder), folder))
        assert [str(file).removeprefix(url(folder)) for file in found] == [
            str(file).removeprefix(str(folder)) for file in local if file.is_file()
        ]
