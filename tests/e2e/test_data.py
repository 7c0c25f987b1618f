"""Whole runs on files with faults: what is skipped, what ends a run, and what evaluation reports."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nvlm.data.loader import Steps
from nvlm.train import loop
from tests.e2e.preloaded import alive, at, run, start, wait_for

SMALL = (
    "name=run data=jsonl data.path=r.jsonl data.window=1 data.workers=0 precision=fp32 llm.layers=1 llm.cross_every=1 "
    "tiling.max_tiles=2 optim.warmup=1 train.threads=1 train.global_batch=8 train.micro_batch=8 train.steps=2"
).split()
NO_QUESTIONS = "evaluate=none"
EVALUATED = "evaluation/heldout/step_00000002"
ANSWERS = f"{EVALUATED}/answers.jsonl"
GOOD = {
    "messages": [{"role": "user", "content": "<image>\nWhat colour?"}, {"role": "assistant", "content": "red"}],
    "images": ["red.png"],
}
TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
BAD = [
    {"messages": [{"role": "user", "content": "ok \ud800 bad"}, TALK["messages"][1]], "id": "\udfff"},
    {"messages": [{"role": "user", "content": ["hello"]}, TALK["messages"][1]]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, TALK["messages"][1]]},
    TALK | {"images": ["a\0.png"]},
    TALK | {"images": ["loop.png"]},
    TALK | {"images": ["pipe.png"]},
    TALK | {"image_path": "red.png"},
]


@pytest.fixture
def where(tmp_path):
    """A folder with images of all kinds; ends leftover processes, even after a failed test."""
    Image.new("RGB", (200, 100), "red").save(tmp_path / "red.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    yield tmp_path
    for pid in alive(tmp_path):
        os.kill(pid, signal.SIGKILL)


def write(path: Path, *rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(where: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (where / "runs" / "run" / name).read_text().splitlines()]


def test_each_record_that_fails_is_named_and_the_others_are_learned(where):
    write(where / "r.jsonl", *[GOOD] * 9, *BAD)
    status, output = run(where, *SMALL, NO_QUESTIONS, "data.max_skipped=0.9")
    assert status == 0, output
    skipped = rows(where, "skipped.jsonl")
    assert sorted(row["record"] for row in skipped) == sorted(f"r.jsonl:{n + 10}" for n in range(len(BAD)))
    assert "records: 16 drawn, 7 skipped, named in skipped.jsonl\n" in output
    steps = rows(where, "metrics.jsonl")
    assert sum(row["skipped"] for row in steps) == len(BAD)
    assert all(row["loss"] > 0 for row in steps)


def test_a_step_without_a_usable_record_ends_the_run_with_counts_and_reasons(where):
    write(where / "r.jsonl", GOOD, *[TALK | {"images": ["gone.png"]}] * 60)
    status, output = run(where, *SMALL, NO_QUESTIONS)
    assert status == 2, output
    error = next(line for line in output.splitlines() if line.startswith("error: "))
    assert "bad records: got " in error and "so that nothing is learned. First: r.jsonl:" in error
    assert "gone.png: no such image" in error
    assert not (where / "runs" / "run" / "checkpoints" / "latest").exists()


def test_a_small_step_without_a_usable_record_moves_no_weights(where):
    """One record per step: bad ones change no weights, and the run continues."""
    write(where / "r.jsonl", GOOD, GOOD, TALK | {"images": ["gone.png"]})
    status, output = run(where, *SMALL, NO_QUESTIONS, "train.global_batch=1", "train.micro_batch=1", "train.steps=3")
    assert status == 0, output
    (empty,) = [row for row in rows(where, "metrics.jsonl") if row["skipped"]]
    assert empty["updated"] is False and empty["trained_tokens"] == 0
    assert "records: 3 drawn, 1 skipped" in output


def test_lost_tiles_are_counted_and_shown(where):
    Image.new("RGB", (300, 100)).save(where / "wide.png")
    write(where / "r.jsonl", GOOD, TALK | {"images": ["wide.png"] * 7})
    status, output = run(where, *SMALL, NO_QUESTIONS, "arch=decoder", "data.seq_length=240", "tiling.max_tiles=3")
    assert status == 0, output
    assert [row["fewer_tiles"] for row in rows(where, "metrics.jsonl")] == [4, 4]
    assert "8 with fewer tiles than tiling.max_tiles allows, to fit" in output
    assert "fewer tiles" in (where / "output").read_text()


def test_evaluation_reads_what_was_encoded_and_another_held_out_file_later(where):
    parts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "re"}, {"type": "text", "text": "d"}]},
    ]
    write(where / "r.jsonl", GOOD)
    write(where / "h.jsonl", GOOD | {"messages": parts}, GOOD | {"messages": parts[:1]}, BAD[0])
    write(where / "other.jsonl", TALK)
    asked = (*SMALL, "evaluate.questions=9")
    status, output = run(where, *asked, "data.heldout_path=nosuch.jsonl")
    assert status == 2 and "data.heldout_path: got 'nosuch.jsonl'" in output
    assert not (where / "runs").exists()
    status, output = run(where, *asked, "data.heldout_path=h.jsonl")
    assert status == 0, output
    assert "not scored, no reference answer: 1 (h.jsonl:2)" in output
    answers = {row["id"]: row for row in rows(where, ANSWERS)}
    assert answers.keys() == {"h.jsonl:1", "h.jsonl:3"}
    assert answers["h.jsonl:1"]["references"] == ["red"] and answers["h.jsonl:3"]["category"] == "unreadable"
    score = json.loads((where / "runs" / "run" / EVALUATED / "score.json").read_text())
    assert score["count"] == 2 and score["unanswered"] == 1
    assert "What colour?" in (where / "runs" / "run" / "report.html").read_text()
    status, output = run(where, *asked, "data.heldout_path=other.jsonl", "resume=auto")
    assert status == 0, output
    assert [row["id"] for row in rows(where, ANSWERS)] == ["other.jsonl:1"]


def test_llavas_list_trains_resumes_and_is_evaluated_with_images_elsewhere(where):
    (where / "pictures").mkdir()
    (where / "red.png").rename(where / "pictures" / "red.png")
    talk = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    entry = {"id": "a", "image": "red.png", "conversations": talk}
    (where / "l.json").write_text(json.dumps([entry] * 7 + [entry | {"image": "gone.png"}]))
    (where / "h.json").write_text(json.dumps([entry]))
    llava = [word.replace("data=jsonl", "data=llava").replace("r.jsonl", "l.json") for word in SMALL]
    asked = (*llava, "data.heldout_path=h.json", "evaluate.questions=1", "data.max_skipped=0.9", "data.root=pictures")
    status, output = run(where, *asked)
    assert status == 0, output
    assert [(row["record"], row["reason"]) for row in rows(where, "skipped.jsonl")] == [
        ("l.json[7]", "gone.png: no such image")
    ] * 2
    assert [row["references"] for row in rows(where, ANSWERS)] == [["red"]]
    (where / "pictures").rename(where / "moved")
    status, output = run(where, *asked[:-1], "data.root=moved", "resume=auto", "train.steps=3")
    assert status == 0 and len(rows(where, "metrics.jsonl")) == 3, output


@dataclasses.dataclass(frozen=True)
class Stuck(Steps):
    """The second step's data never arrive: nobody writes into the pipe that is read."""

    def __getitem__(self, step):
        if step == 1:
            open("pipe.png").read()
        return super().__getitem__(step)


def stuck() -> None:
    build = loop.build_steps
    loop.build_steps = lambda config: Stuck(
        **{f.name: getattr(build(config), f.name) for f in dataclasses.fields(Steps)}
    )


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_signal_ends_a_run_that_waits_for_data(where, loaders):
    write(where / "r.jsonl", GOOD)
    process = start(where, *SMALL, NO_QUESTIONS, f"data.workers={loaders}", "train.stop_seconds=8", change=stuck)
    wait_for(lambda: (now := at(where, 0)) and (now.step, now.phase) == (2, "data"))
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    output = (where / "output").read_text()
    assert process.exitcode == 1, output
    assert "stopped by SIGTERM while waiting for data, which did not arrive in 2 s: nothing saved" in output
    wait_for(lambda: not alive(where), 5)


def picture(number: int) -> bytes:
    """The JPEG file of a picture of a size and a colour of its own."""
    data = io.BytesIO()
    Image.new("RGB", (120 + 60 * number, 300 - 20 * number), (25 * number, 90, 200)).save(data, "JPEG")
    return data.getvalue()


def of_every_kind(where: Path) -> str:
    """Ten records in each of five kinds of files, and the blend of them for data.sources."""
    (where / "images").mkdir()
    for number in range(10):
        (where / "images" / f"{number}.jpg").write_bytes(picture(number))
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "blue"}]
    write(where / "own.jsonl", *[GOOD | {"images": [f"images/{number}.jpg"]} for number in range(10)])
    (where / "llava.json").write_text(json.dumps([{"image": f"{n}.jpg", "conversations": turns} for n in range(10)]))
    columns = {"question": ["Which?"] * 10, "answer": list("abcdefghij"), "image": [picture(n) for n in range(10)]}
    pq.write_table(pa.table(columns), where / "vqa.parquet")
    with tarfile.open(where / "captions.tar", "w") as tar:
        for number in range(10):
            for suffix, data in (("jpg", picture(number)), ("txt", f"Picture {number}.".encode())):
                member = tarfile.TarInfo(f"{number:03}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    write(where / "text.jsonl", *[{"text": f"Number {number}, without an <image>."} for number in range(10)])
    return """{own: {source: jsonl, path: own.jsonl, weight: 1}, text: {source: text, path: text.jsonl, weight: 1},
        llava: {source: llava, path: llava.json, root: images, weight: 1},
        vqa: {source: parquet, path: vqa.parquet, task: vqa, weight: 1},
        captions: {source: webdataset, path: captions.tar, task: caption, weight: 1}}"""


def test_a_blend_of_every_kind_trains_and_resumes_with_the_same_losses(where):
    sources = " ".join(of_every_kind(where).split())
    blend = [word for word in SMALL if not word.startswith(("data=", "data.path="))]
    blend += [
        "data=blend",
        f"data.sources={sources}",
        "data.window=3",
        "train.steps=4",
        "train.save_every=3",
        "train.keep=2",
    ]
    status, output = run(where, *blend, NO_QUESTIONS)
    assert status == 0 and "records: 32 drawn, 0 skipped" in output, output
    losses = [row["loss"] for row in rows(where, "metrics.jsonl")]
    saved = where / "runs" / "run" / "checkpoints"
    (saved / "latest").write_text("step_00000003\n")
    shutil.rmtree(saved / "step_00000004")
    status, output = run(where, *blend, NO_QUESTIONS, "resume=auto")
    assert status == 0 and [row["loss"] for row in rows(where, "metrics.jsonl")] == losses, output
    write(where / "own.jsonl", *[GOOD | {"images": ["images/1.jpg"]}] * 10)
    status, output = run(where, *blend, NO_QUESTIONS, "resume=auto", "train.steps=5")
    assert status == 2 and "error: data.sources.own.path: got " in output, output
