"""Folders written by save_to_disk: rows in any order as plain values, splits by folder, damaged folders refused."""

from __future__ import annotations

import io
import pickle
import random
import subprocess
import sys

import datasets
import pytest
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.config.values import ConfigError
from nvlm.data.look import check_data
from nvlm.data.outline import build_processor
from nvlm.data.record import BadRecord
from nvlm.data.samples import encode
from nvlm.data.sources.registry import build_records
from nvlm.data.sources.saved import SavedDataset, rows_of

TURNS = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def picture(width: int = 60) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 40)).save(file, "png")
    return file.getvalue()


def table(count: int = 7) -> datasets.Dataset:
    features = datasets.Features(
        {"id": datasets.Value("int32"), "messages": [{key: datasets.Value("string") for key in ("role", "content")}],
         "images": datasets.Sequence(datasets.Image())}
    )  # fmt: skip
    rows = {"id": range(count), "messages": [TURNS] * count, "images": [[picture(10 + n)] for n in range(count)]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_rows_are_found_in_any_order_and_images_are_not_decoded(tmp_path):
    table().save_to_disk(tmp_path / "d", num_shards=3)
    found = SavedDataset(tmp_path / "d", "data.path")
    assert len(found) == 7 and len(found.files) == 3 and all(file.suffix == ".arrow" for file in found.files)
    for index in (6, 0, 3):
        row = {"id": index, "messages": TURNS, "images": [{"bytes": picture(10 + index), "path": None}]}
        assert found[index] == row
    assert found.name(3) == "d[3]"
    for outside in (-1, 7):
        with pytest.raises(IndexError):
            found[outside]


def test_a_selection_and_a_format_that_were_saved_do_not_change_the_rows(tmp_path):
    chosen = table().shuffle(seed=1).select(range(4)).with_format("numpy", columns=["id"])
    chosen.save_to_disk(tmp_path / "d")
    found = SavedDataset(tmp_path / "d", "data.path")
    assert [found[n]["id"] for n in range(4)] == list(chosen["id"][:]) and found[0]["messages"] == TURNS


def test_splits_are_folders_and_several_folders_are_one_source(tmp_path, configured):
    whole = datasets.DatasetDict({"train": table(5), "test": table(2)})
    whole.save_to_disk(tmp_path / "d")
    config = configured("data=datasets", f"data.path={tmp_path}/d/train", f"data.heldout_path={tmp_path}/d/test")
    check_data(config, placement_rule("hybrid"))
    records, heldout = (build_records(config.data, seed=0, heldout=part) for part in (False, True))
    assert (len(records), len(heldout), len(rows_of(f"{tmp_path}/d/t*", "data.path"))) == (5, 2, 7)
    processor = build_processor(config, placement_rule("hybrid"))
    assert len(encode(records[4], processor).tile_tokens) and records[4].id == "4"
    with pytest.raises(ConfigError, match="which has the splits train, test, expected one split. Fix: .*/d/train$"):
        build_records(configured("data=datasets", f"data.path={tmp_path}/d").data, seed=0)


def test_a_pickled_copy_reads_the_same_rows_without_torch(tmp_path):
    table().save_to_disk(tmp_path / "d")
    found = rows_of(str(tmp_path / "d"), "data.path")
    (tmp_path / "rows").write_bytes(pickle.dumps(found))
    code = (
        f"import pickle, sys; rows = pickle.load(open({str(tmp_path / 'rows')!r}, 'rb'))\n"
        "assert rows[6]['id'] == 6 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "state.json").unlink(), "which has no state.json"),
        (lambda folder: (folder / "state.json").write_text("{"), "which cannot be opened .JSONDecodeError"),
        (lambda folder: (folder / "dataset_info.json").unlink(), "which cannot be opened"),
        (lambda folder: next(folder.glob("*.arrow")).unlink(), "which cannot be opened"),
        (lambda folder: next(folder.glob("*.arrow")).write_bytes(b""), "which cannot be opened"),
        (lambda folder: cut(next(folder.glob("*.arrow"))), "which cannot be opened"),
        (lambda folder: table(0).save_to_disk(folder), "which cannot be opened"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_before_the_run(tmp_path, configured, change, reason):
    table().save_to_disk(tmp_path / "d")
    change(tmp_path / "d")
    config = configured("data=datasets", f"data.path={tmp_path}/d")
    for check in (lambda: check_data(config, placement_rule("hybrid")), lambda: build_records(config.data, seed=0)):
        with pytest.raises(ConfigError, match=f"^data.path: got .*/d, {reason}"):
            check()


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[:-900])


def test_a_file_and_a_missing_folder_are_called_by_name(tmp_path):
    (tmp_path / "f.arrow").write_bytes(b"ARROW1")
    for path, reason in (("f.arrow", "f.arrow', a file, expected a folder that save_to_disk"), ("gone", "gone', exp")):
        with pytest.raises(ConfigError, match=reason):
            rows_of(str(tmp_path / path), "data.path")


def test_a_file_outside_the_folder_is_refused(tmp_path):
    for name in ("secret", "d"):
        table(3).save_to_disk(tmp_path / name)
    state = tmp_path / "d" / "state.json"
    state.write_text(state.read_text().replace("data-", "../secret/data-"))
    with pytest.raises(ConfigError, match="state.json names .*secret/data-.*, expected files in the folder itself"):
        rows_of(str(tmp_path / "d"), "data.path")


def test_a_url_is_refused_with_what_to_do(configured):
    data = configured("data=datasets", "data.path=s3://bucket/d").data
    with pytest.raises(ConfigError, match="expected a folder on a disk. Fix: copy it, or use its Parquet files"):
        build_records(data, seed=0)


def test_mutated_files_never_end_the_process(tmp_path):
    """Arrow trusts the offsets in its files, and reads outside them if they are wrong."""
    table(20).save_to_disk(tmp_path / "d")
    path = next((tmp_path / "d").glob("*.arrow"))
    whole, found = path.read_bytes(), set()
    for seed in range(150):
        draw = random.Random(seed)
        data = bytearray(whole)
        for _ in range(draw.choice((1, 3, 10))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.unlink()  # the old content may still be mapped
        path.write_bytes(data)
        found.add(outcome(tmp_path / "d"))
    assert found == {"refused", "bad", "read"}


def outcome(folder) -> str:
    try:
        rows = SavedDataset(folder, "data.path")
    except ConfigError:
        return "refused"
    try:
        for index in range(len(rows)):
            rows[index]
    except BadRecord as reason:
        assert "is damaged: " in str(reason) or "cannot be read: " in str(reason)
        return "bad"
    return "read"
