"""The index of a run's records: it gives the same plans as the records, and is refused if it is not theirs."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.commands import prepare as command
from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.data.blend import build_order
from nvlm.data.index import walk
from nvlm.data.index.build import prepare
from nvlm.data.index.files import META, RECORD, RECORDS
from nvlm.data.index.opened import open_records
from nvlm.data.loader import Steps, plan_window
from nvlm.data.look import check_data
from nvlm.data.outline import build_processor
from nvlm.data.sources import json_places
from nvlm.data.table import Table
from nvlm.inputs import identity

SIZES = ((448, 448), (900, 100), (100, 900), (1344, 896), (60, 50), (2000, 400))


@cache
def cached(*overrides):
    return compose_config(*overrides)


def turns(question, answer="Yes."):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_lines(path, rows):
    path.write_text("".join((json.dumps(row) if row is not None else "") + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Files of four sources, with bad records, blank lines and documents that are too long."""
    for number, size in enumerate(SIZES):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    rng = np.random.default_rng(0)
    chat = []
    for number in range(150):
        images = [f"{int(i)}.png" for i in rng.integers(0, len(SIZES) + (number % 9 == 0), rng.integers(0, 4))]
        chat.append({"messages": turns("so " * int(rng.integers(1, 120)), "Yes."), "images": images})
    chat[3], chat[10], chat[20] = None, None, {"messages": "none"}
    write_lines(tmp_path / "chat.jsonl", chat)
    listed = [{"id": i, "image": "1.png", "conversations": turns(f"\u4e2d{i}")} for i in range(40)]
    listed = [
        {**row, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]} for row in listed
    ]
    (tmp_path / "list.json").write_text(json.dumps(listed, ensure_ascii=False))
    write_lines(tmp_path / "text.jsonl", [{"text": "word " * int(n)} for n in rng.integers(0, 900, 60)])
    words = ["a few words <image> " * int(n) + "and more " * 30 for n in rng.integers(0, 7, 60)]
    papers = [{"messages": [{"role": "document", "content": text}], "images": ["3.png"] * text.count("<image>")}
              for text in words]  # fmt: skip
    pq.write_table(
        pa.Table.from_pylist([{"json": json.dumps(paper)} | paper for paper in papers]), tmp_path / "p.parquet"
    )
    return tmp_path


def blended(folder, *overrides, arch="hybrid"):
    parts = (
        f"chat: {{source: jsonl, path: {folder}/chat.jsonl, weight: 3}}",
        f"list: {{source: llava, path: {folder}/list.json, weight: 1}}",
        f"text: {{source: text, path: {folder}/text.jsonl, weight: 1, text_only: true}}",
        f"papers: {{source: parquet, path: {folder}/p.parquet, weight: 1, text_only: {arch == 'xattn'}}}",
    )
    lengths = ("data.seq_length=400", "data.cross_length=500", "data.row_length=800")
    source = f"data.sources={{{', '.join(parts)}}}"
    return cached(f"arch={arch}", "data=blend", source, *lengths, "data.images_first=0.5", *overrides)


def single(folder, *overrides):
    return cached("data=jsonl", f"data.path={folder}/chat.jsonl", f"data.index={folder}/index", *overrides)


def prepared(config, workers=1):
    return command._prepared(config, command.Path(config.data.index), workers)


def steps_of(config, **others):
    processor = build_processor(config, placement_rule(config.arch.name))
    records, index = open_records(config.data, config.seed, processor)
    order = build_order(config.data.source, records, config.seed, 64)
    assert (index is None) == (config.data.index is None)
    values = dict(steps=8, micro_batch=2, row_length=800, data_rank=0, data_size=1, window=2)
    return Steps(records=records, processor=processor, order=order, index=index, **values | others)


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_plans_are_the_same_with_and_without_an_index(folder, arch):
    index = f"data.index={folder}/index"
    prepared(blended(folder, index, arch="hybrid"))
    read, planned = steps_of(blended(folder, arch=arch)), steps_of(blended(folder, index, arch=arch))
    found = [plan for first in range(0, 8, 2) for plan in plan_window(planned, range(first, first + 2))]
    assert found == [plan for first in range(0, 8, 2) for plan in plan_window(read, range(first, first + 2))]
    samples = [sample for plan in found for row in plan.rows for sample in row]
    assert {sample.source for sample in samples} == {0, 1, 2, 3}
    assert any(sample.lengths[0] == 400 for sample in samples if sample.source in (2, 3))  # a document that was cut
    assert any(sample.pictures.fewer_tiles for sample in samples)
    reasons = {reason for plan in found for _, reason in plan.skipped}
    assert {"6.png: no such image", "no list of messages", "no text to learn: the document has none"} <= reasons
    assert any("text_only=true" in reason for reason in reasons) == (arch == "xattn")
    assert any(reason.startswith("the text takes") for reason in reasons)


def test_no_record_is_read_and_no_file_searched_to_start_and_plan(folder, monkeypatch):
    config = single(folder)
    prepared(config)
    searched = steps_of(cached(*single_words(folder)))
    monkeypatch.setattr(json_places, "places", None)
    monkeypatch.setattr("nvlm.data.sources.json_file.places", None)
    steps = steps_of(config)
    assert [steps.records.name(i) for i in range(148)] == [searched.records.name(i) for i in range(148)]
    assert [steps.records[i].messages for i in (0, 2, 146)] == [searched.records[i].messages for i in (0, 2, 146)]
    monkeypatch.setattr("nvlm.data.loader.outline", None)
    plan_window(steps, range(2))
    with pytest.raises(TypeError):
        steps_of(cached(*single_words(folder)))


def single_words(folder):
    return ("data=jsonl", f"data.path={folder}/chat.jsonl")


def contents(index):
    return {str(path.relative_to(index)): path.read_bytes() for path in index.rglob("*") if path.is_file()}


def test_several_processes_write_the_same_index_as_one(folder):
    found = []
    for workers in (1, 2):
        config = blended(folder, f"data.index={folder}/by{workers}")
        prepared(config, workers)
        found.append(contents(folder / f"by{workers}"))
    assert found[0] == found[1] and len(found[0]) == 4 * 6 + 1  # and the lock


class Killed(BaseException):
    """Ends a walk at any point, as a signal does."""


def test_an_interrupted_walk_goes_on_where_it_was(folder, monkeypatch):
    config, whole, read = single(folder), folder / "whole", []
    prepared(cached(*single_words(folder), f"data.index={whole}"))
    measured = walk.measured

    def counted(records, processor, numbers, most=99):
        if len(read) == most:
            raise Killed
        read.append(numbers)
        return measured(records, processor, numbers)

    for most in (1, 2):
        monkeypatch.setattr(walk, "measured", lambda *given, most=most: counted(*given, most=most))
        with pytest.raises(Killed):
            prepared(config)
    assert not (folder / "index" / "records").exists()
    monkeypatch.setattr(walk, "measured", counted)
    prepared(config)
    assert [number for numbers in read for number in numbers] == list(range(148)) and len(read) == 3
    assert contents(folder / "index") == contents(whole)
    prepared(config)  # up to date
    assert len(read) == 3


def test_what_was_walked_before_a_change_is_not_used(folder, monkeypatch):
    config, measured = single(folder), walk.measured
    monkeypatch.setattr(walk, "measured", lambda *given: measured(*given) if given[2].start == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(config)
    text = (folder / "chat.jsonl").read_text().replace("so so", "oh yes", 1)
    (folder / "chat.jsonl").write_text(text)
    monkeypatch.setattr(walk, "measured", measured)
    prepared(config)
    assert plan_window(steps_of(config), range(2)) == plan_window(steps_of(cached(*single_words(folder))), range(2))


def shift_time(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def append(path):
    path.write_bytes(path.read_bytes() + b"\n")


def exchange(path):
    path.write_bytes(path.read_bytes().replace(b"Yes", b"No!", 1))
    shift_time(path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-12])


@pytest.mark.parametrize(
    ("change", "words", "reason"),
    [
        (lambda at: append(at / "chat.jsonl"), (), r"of chat.jsonl when it had [\d,]+ bytes, now it has "),
        (lambda at: exchange(at / "chat.jsonl"), (), "of chat.jsonl, which was changed since"),
        (lambda at: (at / "chat.jsonl").rename(at / "talk.jsonl"), ("data.path={}/talk.jsonl",), "of chat.jsonl, in "),
        (lambda at: None, ("data.path={}/*.jsonl",), "of 1 files, now there are 2"),
        (lambda at: None, ("data.system=Hi",), "prepared with data.system=Follow .*, not Hi"),
        (lambda at: None, ("data.max_pixels=9",), "prepared with data.max_pixels=50000000, not 9"),
        (lambda at: None, ("data.task=vqa",), "prepared with data.task=None, not vqa"),
        (lambda at: None, ("data.images_first=0.5",), "prepared with data.images_first=0.0, not 0.5"),
        (lambda at: None, ("llm.chat=plain",), "prepared with llm.chat=chatml, not plain"),
        (lambda at: None, ("llm.bos='<|im_start|>'",), "prepared with "),
        (lambda at: cut_short(at / "index" / "records" / RECORDS), (), r"that cannot be read \(cut short\)"),
        (lambda at: (at / "index" / "records" / META).write_text("[]"), (), r"that cannot be read \(damaged\)"),
        (lambda at: (at / "index" / "records" / "places.bin").unlink(), (), "that cannot be read"),
    ],
    ids=range(13),
)
def test_a_stale_index_is_refused_with_what_changed(folder, change, words, reason):
    prepared(single(folder))
    change(folder)
    config = single(folder, *(word.format(folder) for word in words))
    with pytest.raises(ConfigError, match=f"^data.index: got .*/index/records, an index {reason}.* Fix: PREPARE$"):
        check_data(config, placement_rule("hybrid"), "PREPARE")


def test_what_does_not_change_lengths_does_not_make_an_index_stale(folder):
    prepared(single(folder))
    shift_time(folder / "chat.jsonl")  # copied
    shutil.copytree(folder, folder / "moved")
    words = ("data.path={0}/moved/chat.jsonl", "data.index={0}/moved/index", "arch=xattn", "tiling.max_tiles=2",
             "data.seq_length=300", "data.take=first:10%", "seed=3", "data.max_skipped=1")  # fmt: skip
    check_data(single(folder, *(word.format(folder) for word in words)), placement_rule("xattn"))
    state = folder / "index" / "records" / META
    before = json.loads(state.read_text())
    prepared(single(folder))
    now = json.loads(state.read_text())
    assert now["files"][0]["modified"] == before["files"][0]["modified"] + 1 and {**now, "files": 0} == {
        **before,
        "files": 0,
    }


def test_a_start_reads_no_file_that_the_index_has_seen(folder, monkeypatch):
    prepared(blended(folder, f"data.index={folder}/index"))
    config, plain = blended(folder, f"data.index={folder}/index"), blended(folder)
    expected = identity.of_records(plain, steps_of(plain).records)
    shift_time(folder / "text.jsonl")
    records, read = steps_of(config).records, []
    digest = identity.content_digest
    monkeypatch.setattr(identity, "content_digest", lambda path, *rest: read.append(path.name) or digest(path, *rest))
    found = identity.of_records(config, records)
    assert found == expected and read == ["text.jsonl"]


@pytest.mark.parametrize("words", [("data.task=vqa", "data.path={}/vqa.jsonl"), ("data.images_first=0.5",)])
def test_what_is_drawn_belongs_to_its_seed(folder, words):
    write_lines(folder / "vqa.jsonl", [{"image": "0.png", "question": "?", "answer": "!"}])
    words = [word.format(folder) for word in words]
    prepared(single(folder, *words))
    assert plan_window(steps_of(single(folder, *words)), range(2))
    with pytest.raises(ConfigError, match="prepared with seed=1234, not 5"):
        check_data(single(folder, *words, "seed=5"), placement_rule("hybrid"))


def test_a_missing_index_and_text_that_depends_on_tiles_are_refused(folder):
    with pytest.raises(ConfigError, match="^data.index: got '.*/index/records', where no index is, .*prepare.py"):
        check_data(single(folder), placement_rule("hybrid"))
    with pytest.raises(ConfigError, match="^data.path: got .*none.jsonl', expected a .jsonl"):
        prepared(single(folder, f"data.path={folder}/none.jsonl"))
    with pytest.raises(ConfigError, match="^data.index: got one with data.tokenize=joined, .* Fix: data.index=null"):
        compose_config("arch=decoder", *single_words(folder), "data.index=x", "data.tokenize=joined")


def test_an_image_that_changed_since_it_was_indexed_stops_the_run_and_names_the_index(folder):
    prepared(single(folder))
    for number in range(len(SIZES)):
        Image.new("RGB", (33, 44)).save(folder / f"{number}.png")
    fix = "remove the folder of data.index, then python launch/prepare.py"
    with pytest.raises(ValueError, match=f"when it was planned, 33 x 44 px .*{fix}"):
        steps_of(single(folder))[0]
    shutil.rmtree(folder / "index")  # as it says
    prepared(single(folder))
    assert steps_of(single(folder))[0].micro_batches


def test_the_launcher_refuses_without_torch(folder):
    code = (
        "import sys; from nvlm.commands.compose import check_overrides\n"
        "from nvlm.commands.launch import check_machine\n"
        f"sys.argv = ['launch/train.py', 'data=jsonl', 'data.path={folder}/chat.jsonl', 'data.index={folder}/index']\n"
        "try: check_machine(*check_overrides(sys.argv[1:]))\n"
        "except ValueError as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    fix = f"python launch/prepare.py data=jsonl data.path={folder}/chat.jsonl data.index={folder}/index"
    assert told.endswith(f"Fix: {fix}\n")


def test_generated_records_can_be_indexed(folder):
    source = "data.sources={a: {source: pages, records: 20, heldout_records: 2, questions: 1, weight: 1}}"
    config = cached("data=blend", source, f"data.index={folder}/index")
    prepared(config)
    plain = cached("data=blend", source)
    assert plan_window(steps_of(config), range(2)) == plan_window(steps_of(plain), range(2))


def test_there_may_be_more_files_than_a_process_can_open(tmp_path):
    count, (before, most) = 90, resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(count):
        write_lines(tmp_path / f"{number:02}.jsonl", [{"text": f"text {number}"}])
    config = cached("data=jsonl", f"data.path={tmp_path}", f"data.index={tmp_path}/index", "data.workers=0")
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + count // 2, most))
    try:
        prepared(config)
        assert len(steps_of(config).records) == count
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


def test_only_one_process_prepares_an_index_at_a_time(folder):
    with command.alone(folder / "index"), pytest.raises(ConfigError, match="another process prepares an index"):
        prepared(single(folder))


def test_progress_of_a_source_without_files_begins_with_its_number_of_records(tmp_path):
    config = cached("data=pages", "data.records=20")
    processor = build_processor(config, placement_rule("hybrid"))
    told = []
    prepare(
        walk.Walk(config.data.source, "", config.seed, processor, tmp_path / "partial"),
        tmp_path / "index",
        1,
        lambda *amounts: told.append(amounts),
    )
    assert told == [(0, 20), (20, 20)]


@pytest.mark.parametrize("below", ["", "x"])
def test_a_file_in_the_place_of_the_index_is_refused(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="data.index: got .*file.*, a file or in one, expected a folder"):
        with command.alone(tmp_path / "file" / below):
            pass


def test_rows_of_a_table_survive_pickling_and_a_file_cut_short_is_refused(tmp_path):
    np.array([(n, 10 * n) for n in range(9)], dtype=RECORD).tofile(tmp_path / "t")
    table = pickle.loads(pickle.dumps(Table(tmp_path / "t", RECORD).split([2, 7])[1]))
    assert list(table) == [(n, 10 * n) for n in range(2, 9)] and len(table) == 7
    with pytest.raises(IndexError):
        table[7]
    with pytest.raises(ValueError, match="cut short"):
        Table(tmp_path / "t", RECORD).split([10])


@pytest.mark.parametrize("block", [1, 3, 7, 1 << 20])
def test_lines_are_found_whatever_part_of_the_file_is_searched_at_a_time(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_places, "_BLOCK", block)
    rng, file = np.random.default_rng(0), tmp_path / "x.jsonl"
    pieces = [b'{"a":1}', b"\n", b" ", b"\t", b"\r\n", b"  x\n", b"ab"]
    for _ in range(100):
        file.write_bytes(b"x" + b"".join(pieces[i] for i in rng.integers(0, len(pieces), rng.integers(1, 14))))
        at, expected = 0, []
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
            end = min(at + len(line) + 1, file.stat().st_size)
            if line.strip():
                expected.append((at, end - at, number))
            at = end
        assert list(json_places.places(file, file, "k", False)) == expected
        assert [row for found in json_places.blocks(file, file, "k", False) for row in found.tolist()] == expected
