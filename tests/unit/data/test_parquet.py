"""Parquet files: rows in any order, with bounded reading, as plain values; wrong files are refused by name."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import random
import re
import subprocess
import sys

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.config.values import ConfigError
from nvlm.data.look import check_data
from nvlm.data.outline import build_processor
from nvlm.data.record import BadRecord
from nvlm.data.samples import encode
from nvlm.data.sources import parquet
from nvlm.data.sources.parquet import ParquetFile, new_cache, rows_of
from nvlm.data.sources.recent import Recent
from nvlm.data.sources.registry import build_records

TURNS = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]


def picture(width: int = 60, height: int = 40) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    return file.getvalue()


def rows(count: int, first: int = 0) -> list[dict]:
    """Rows whose image is `first` + its number + 10 px wide."""
    return [
        {"id": f"r{n}", "messages": TURNS, "images": [{"bytes": picture(n + 10), "path": None}]}
        for n in range(first, first + count)
    ]


def write(path, table, **options):
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table), path, **options)
    return path


def test_rows_are_found_in_any_order_over_groups_and_files(tmp_path):
    write(tmp_path / "b.parquet", rows(5, first=7), row_group_size=2)
    write(tmp_path / "a.parquet", rows(7), row_group_size=3)
    found = rows_of(str(tmp_path), "data.path")
    assert len(found) == 12 and [file.name for file in found.files] == ["a.parquet", "b.parquet"]
    order = list(range(12))
    random.Random(0).shuffle(order)
    for index in order:
        assert found[index] == rows(1, first=index)[0]
    assert (found.name(2), found.name(8)) == ("a.parquet[2]", "b.parquet[1]")
    for outside in (-1, 12):
        with pytest.raises(IndexError):
            found[outside]


def test_groups_without_rows_and_files_without_rows_hold_no_record(tmp_path):
    table = pa.Table.from_pylist(rows(3))
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table.slice(0, 0), table.slice(0, 2), table.slice(0, 0), table.slice(2)):
            writer.write_table(part)
    write(tmp_path / "b.parquet", table.slice(0, 0))
    found = rows_of(str(tmp_path / "*.parquet"), "data.path")
    assert [found[n]["id"] for n in range(len(found))] == ["r0", "r1", "r2"]


def test_a_row_reads_its_group_alone_and_the_last_groups_are_kept(tmp_path, monkeypatch):
    read = []
    group = ParquetFile._group
    monkeypatch.setattr(ParquetFile, "_group", lambda self, number: read.append(number) or group(self, number))
    monkeypatch.setattr(parquet, "_KEPT", 3 * pa.Table.from_pylist(rows(10)).nbytes)
    monkeypatch.setattr(parquet, "_GROUP", 1 << 20)
    file = ParquetFile(write(tmp_path / "a.parquet", rows(100), row_group_size=10), "data.path", new_cache())
    assert read == []
    for index in (95, 5, 96, 4, 97):
        file[index]
    assert read == [9, 0]
    for index in (15, 25, 35, 96):  # 9 and 0 have made room
        file[index]
    assert read == [9, 0, 1, 2, 3, 9]
    assert file.cache.groups.total <= parquet._KEPT


def test_what_is_kept_is_bounded_by_size_and_the_last_is_always_kept():
    kept = Recent(10, len)
    made = []

    def get(text):
        return kept.get(text, lambda: made.append(text) or text)

    for text in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa", "bbbb"):
        assert get(text) == text
    assert made == ["aaaa", "bbbb", "cccc", "bbbb"]
    assert get("d" * 50) and list(kept.values) == ["d" * 50] and kept.total == 50
    assert pickle.loads(pickle.dumps(kept)).total == 0


def test_a_large_file_is_opened_without_objects_for_its_rows(tmp_path):
    table = pa.table({"id": pa.repeat(pa.scalar(7, pa.int32()), 10_000_000)})
    file = ParquetFile(write(tmp_path / "a.parquet", table, row_group_size=100_000), "data.path", new_cache())
    assert len(file) == 10_000_000 and len(file.ends) == 100
    assert len(pickle.dumps(file)) < 3000
    assert file[9_999_999] == {"id": 7}


def row_in_child(file: ParquetFile, index: int) -> dict:
    return file[index]


def test_forked_workers_read_through_files_of_their_own(tmp_path):
    file = ParquetFile(write(tmp_path / "a.parquet", rows(9), row_group_size=3), "data.path", new_cache())
    file[0]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap(row_in_child, [(file, index) for index in (8, 0, 4, 7)])
    assert [row["id"] for row in found] == ["r8", "r0", "r4", "r7"]
    assert file[3]["id"] == "r3"


def test_a_pickled_copy_reads_the_same_rows_without_torch(tmp_path):
    found = rows_of(str(write(tmp_path / "a.parquet", rows(9), row_group_size=3)), "data.path")
    found[0]
    (tmp_path / "rows").write_bytes(pickle.dumps(found))
    code = (
        f"import pickle, sys; rows = pickle.load(open({str(tmp_path / 'rows')!r}, 'rb'))\n"
        "assert rows[8]['id'] == 'r8' and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_pandas_and_datasets_write_becomes_plain_values(tmp_path, configured):
    import datasets

    image = Image.new("RGB", (60, 40))
    image.save(tmp_path / "x.png")
    frame = pandas.DataFrame({"messages": [np.array(TURNS)] * 2, "images": [np.array([picture()], dtype=object)] * 2})
    frame.to_parquet(tmp_path / "pandas.parquet", row_group_size=1)
    features = datasets.Features(
        {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("large_string")}],
         "images": datasets.Sequence(datasets.Image())}
    )  # fmt: skip
    whole = datasets.Dataset.from_dict(
        {"messages": [TURNS] * 2, "images": [[image], [str(tmp_path / "x.png")]]}, features=features
    )
    whole.to_parquet(tmp_path / "datasets.parquet")
    single = [{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}], "image": picture()}]
    write(tmp_path / "single.parquet", single)
    processor = build_processor(configured("arch=decoder"), placement_rule("decoder"))
    for name in ("pandas", "datasets", "single"):
        data = configured("data=parquet", f"data.path={tmp_path / name}.parquet").data
        for record in (records := build_records(data, seed=0)):
            assert type(record.messages) is list and type(record.messages[0]) is dict
            assert len(encode(record, processor).tile_tokens)
        assert records.name(0) == f"{name}.parquet[0]"


def test_a_map_with_a_repeated_key_makes_a_bad_record(tmp_path):
    column = pa.array([[("a", 1), ("b", 2)], [("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int32()))
    file = ParquetFile(write(tmp_path / "a.parquet", pa.table({"m": column})), "data.path", new_cache())
    assert file[0] == {"m": {"a": 1, "b": 2}}
    with pytest.raises(BadRecord, match="cannot be read: KeyError"):
        file[1]


def test_text_that_is_not_utf8_makes_a_bad_record(tmp_path):
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
    file = ParquetFile(write(tmp_path / "a.parquet", pa.table({"m": broken})), "data.path", new_cache())
    with pytest.raises(BadRecord, match="cannot be read: UnicodeDecodeError"):
        file[0]


def test_a_damaged_group_spoils_its_own_rows_alone(tmp_path):
    path = write(tmp_path / "a.parquet", rows(40), row_group_size=20, compression="zstd")
    offset = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = b"\xee" * 200
    path.write_bytes(data)
    file = ParquetFile(path, "data.path", new_cache())
    with pytest.raises(BadRecord, match="row group 0 cannot be read"):
        file[3]
    assert file[23]["id"] == "r23"


def test_a_group_that_grows_beyond_all_bounds_is_given_up(tmp_path, monkeypatch):
    table = pa.table({"t": pa.array(["x" * 100_000] * 2000)})  # 100 kB in the file, 200 MB decoded
    path = write(tmp_path / "a.parquet", table)
    assert path.stat().st_size < 300_000
    monkeypatch.setattr(parquet, "_KEPT", 10 << 20)
    with pytest.raises(BadRecord, match="row group 0 takes more than 20 MiB"):
        ParquetFile(path, "data.path", new_cache())[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "which is empty"),
        (b'{"messages": []}\n', "which is of another kind, expected a Parquet file"),
        (b"PAR1", "damaged or cut short"),
        (b"PAR1" + bytes(5000), "damaged or cut short"),
        ("cut", "damaged or cut short"),
        ("none", "which has no rows"),
    ],
)
def test_a_wrong_file_is_refused_by_name_before_the_run(tmp_path, configured, content, reason):
    path = write(tmp_path / "a.parquet", rows(9), row_group_size=3)
    if content == "none":
        write(path, pa.Table.from_pylist(rows(1)).slice(0, 0))
    else:
        path.write_bytes(path.read_bytes()[:-400] if content == "cut" else content)
    config = configured("data=parquet", f"data.path={path}")
    for check in (lambda: check_data(config, placement_rule("hybrid")), lambda: build_records(config.data, seed=0)):
        with pytest.raises(ConfigError, match=f"^data.path: got .*a.parquet.*{reason}.*Fix: data.path="):
            check()


def test_a_missing_file_a_folder_without_one_and_other_columns_are_refused(tmp_path, configured):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "other.parquet", [{"url": "x", "text": 3}])
    for path, reason in (
        ("gone.parquet", "expected a Parquet file that exists"),
        ("empty", r"expected a folder with \*.parquet"),
        ("other.parquet", r"unusable .other.parquet\[0\]: no list of messages or conversations"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_data(configured("data=parquet", f"data.path={tmp_path / path}"), placement_rule("hybrid"))


def test_groups_that_are_too_large_to_read_for_each_row_are_refused_with_a_remedy(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", rows(100), compression="none")
    monkeypatch.setattr(parquet, "_GROUP", 3000)
    rows_of(str(path), "data.path")  # all of it can be kept
    monkeypatch.setattr(parquet, "_KEPT", 8000)
    with pytest.raises(ConfigError, match=r"a row group of 0 MiB, all of which") as caught:
        rows_of(str(path), "data.path")
    (tmp_path / "new").mkdir()
    code = re.search('python -c "(.*)"$', str(caught.value))[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path / "new")
    found = rows_of(str(tmp_path / "new"), "data.path")
    assert [found[n]["id"] for n in (0, 99)] == ["r0", "r99"] and len(found.parts[0].ends) == 10


def test_a_row_of_plain_columns_is_read_by_its_task(tmp_path, configured):
    path = write(tmp_path / "a.parquet", [{"question": "What?", "answer": "A cat.", "image": {"bytes": picture()}}])
    records = build_records(configured("data=parquet", "data.task=vqa", f"data.path={path}").data, seed=0)
    assert records[0].images == [picture()] and records[0].messages[1]["content"] == "A cat."


def test_mutated_files_never_raise_anything_else(tmp_path):
    path = write(tmp_path / "a.parquet", rows(12), row_group_size=4)
    whole, found = path.read_bytes(), set()
    for seed in range(200):
        draw = random.Random(seed)
        data = bytearray(whole)
        for _ in range(draw.choice((1, 3, 10))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice((len(data), len(data), draw.randrange(len(data))))])
        found.add(outcome(path))
    assert found == {"refused", "bad", "read"}


def outcome(path) -> str:
    try:
        found = rows_of(str(path), "data.path")
    except ConfigError:
        return "refused"
    try:
        for index in range(min(len(found), 20)):
            found[index]
    except BadRecord:
        return "bad"
    return "read"
