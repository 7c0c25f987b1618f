"""What a sweep shows: how far its runs are, the time left, the table and the lines."""

from __future__ import annotations

import io
import json
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from nvlm.sweep.ledger import Row
from nvlm.sweep.process import Job, Running
from nvlm.sweep.progress import At, at, time_left
from nvlm.sweep.schedule import State
from nvlm.sweep.shares import Share
from nvlm.sweep.show import Lines, closing, duration, summary, table


def rows(**status: str) -> dict[str, Row]:
    return {name: Row(folder=name, status=one, seconds=40.0 * (one == "done")) for name, one in status.items()}


def running(folder: str, seconds: float) -> Running:
    process, since = SimpleNamespace(poll=lambda: None), time.monotonic() - seconds
    return Running(
        job=Job(folder=folder, command=(), steps=100), share=Share((0,)), process=process, since=since, log_size=0
    )


def write_steps(folder, *losses, seconds=0.5, end=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "loss": loss, "seconds": seconds}) + "\n" for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(lines) + end)


def test_how_far_a_run_is(tmp_path):
    assert at(tmp_path / "none") is None
    write_steps(tmp_path, *[3.0] * 5000, 1.5, end='{"step": 5002, "lo')  # the last row is still being written
    assert at(tmp_path) == At(5001, 1.5, 0.5)
    write_steps(tmp_path, None)
    assert at(tmp_path) == At(1, None, 0.5)
    write_steps(tmp_path)
    assert at(tmp_path) is None


@pytest.mark.parametrize(
    ("status", "going", "expected"),
    [
        ({"a": "waiting"}, [], None),
        ({"a": "running"}, [(3.0, None, 10)], None),
        ({"a": "done", "b": "waiting", "c": "waiting"}, [], 40.0),  # two of 40 s, two at a time
        ({"a": "done", "b": "running"}, [(20.0, At(50, 1.0, 0.5), 100)], 25.0),  # no shorter than the longest
        ({"a": "running", "b": "waiting"}, [(20.0, At(40, 1.0, 0.5), 100)], (30 + 50) / 2),
        ({"a": "done", "b": "running", "c": "waiting"}, [(10.0, None, 100)], (30 + 40) / 2),
        ({"a": "done", "b": "failed"}, [], 0.0),
    ],
)
def test_the_time_left(status, going, expected):
    assert time_left(rows(**status).values(), going, 2) == expected


def test_durations():
    assert [duration(s) for s in (0.4, 59, 61, 3599.6, 7800)] == ["0 s", "59 s", "1 min 1 s", "1 h 0 min", "2 h 10 min"]


def test_the_table_has_running_and_failed_runs(tmp_path):
    write_steps(tmp_path / "seed=2", 3.0, 1.25)
    known = rows(a="done", b="failed", c="waiting") | {"seed=2": Row(folder="seed=2", status="running")}
    known["b"] = Row(folder="b", status="failed", reason="step 9: loss [nan]", seconds=70)
    state = State(known, (running("seed=2", 30),))
    console = Console(file=io.StringIO(), width=100)
    console.print(table(state, tmp_path, 2))
    text = console.file.getvalue()
    assert "1 of 4 runs done, 1 running, 1 failed, 1 waiting, about 49 s left" in text
    assert ["seed=2", "2/100", "1.250", "30", "s"] in [line.split() for line in text.splitlines()]
    assert "failed: step 9: loss [nan]" in text


def test_lines_are_printed_when_a_status_changes(tmp_path):
    console = Console(file=io.StringIO(), width=40, highlight=False)
    lines = Lines(console, tmp_path, 2, rows(a="done", b="waiting", c="waiting"))
    state = State(rows(a="done", b="running", c="waiting"), (running("b", 5),))
    lines(state)
    lines(state)
    lines.due = 0.0
    write_steps(tmp_path / "b", 2.5)
    lines(state)
    failed = rows(a="done", b="failed", c="waiting") | {"b": Row(folder="b", status="failed", reason="no [b]memory")}
    lines(State(failed))
    assert console.file.getvalue().splitlines() == [
        "b: started",
        "1 of 3 runs done, 1 running, 1 waiting, about 50 s left; b step 1/100 loss 2.500",
        "b: failed after 0 s: no [b]memory",
    ]
    assert summary(State(rows(a="done")), tmp_path, 2) == "1 of 1 runs done"
    lines(State(rows(a="done", b="running"), (running("b", 5),), stopping=True))
    last = console.file.getvalue().splitlines()[-1]
    assert last == "1 of 2 runs done, 1 running, stopping as soon as these have saved; b step 1/100 loss 2.500"


def test_the_last_lines_name_the_failed_runs(tmp_path):
    known = [Row(folder="a", status="done"), Row(folder="b", status="failed", reason="loss nan"), Row(folder="c")]
    assert closing(known, tmp_path, "python launch/train.py -m seed=1,2,3") == [
        f"1 of 3 runs done, in {tmp_path}",
        f"failed: b: loss nan (log: {tmp_path}/b/log.txt)",
        f"to compare them: python launch/report.py runs={tmp_path}",
        "to do what is missing, and nothing else: python launch/train.py -m seed=1,2,3",
    ]
    assert [line.split(":")[0] for line in closing(known[:1], tmp_path, "again")][1:] == ["to compare them"]
