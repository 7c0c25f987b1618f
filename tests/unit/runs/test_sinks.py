"""Logging while the disk is full or the pipe closed: nothing fails, no piece is cut, and it is reported once."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvlm.runs import sinks
from nvlm.runs.files import write_whole
from nvlm.runs.sinks import Appended, json_line
from nvlm.train.metrics import Board, keep_steps
from tests.boards import scalars

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def room_for(size: int):
    """Limit this process's files to `size` bytes: a write goes up to the limit, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


LINES = [json_line({"step": step, "loss": 1.0}) for step in range(1, 9)]


def test_lines_wait_for_room_and_none_is_cut(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    file = Appended(path)
    with room_for(2 * len(LINES[0]) + 5):
        for line in LINES[:5]:
            file.write(line)
        assert path.read_bytes() == b"".join(LINES[:2])
    for line in LINES[5:]:
        file.write(line)
    file.close()
    assert path.read_bytes() == b"".join(LINES)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "File too large): training goes on" in told[0] and "can be written again" in told[1], told


def test_what_waits_is_bounded_and_what_is_lost_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sinks, "_MOST", 3 * len(LINES[0]))
    file = Appended(tmp_path / "metrics.jsonl")
    with room_for(0):
        for line in LINES[:-1]:
            file.write(line)
        assert len(file.waiting) == 3
        file.close()
    file.write(LINES[-1])
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(LINES[4:])
    told = capsys.readouterr().err
    assert "7 entries were never written" in told and "4 entries were lost" in told


def test_json_has_no_numbers_that_json_lacks():
    line = json_line({"loss": float("nan"), "phases": {"data": float("inf")}, "list": [1, -float("inf")], "lr": 0.5})

    def refuse(name):
        raise AssertionError(name)

    row = json.loads(line, parse_constant=refuse)
    assert row == {"loss": None, "phases": {"data": None}, "list": [1, None], "lr": 0.5}


def test_curves_are_drawn_where_a_loss_was_no_number(tmp_path):
    from nvlm.evaluate.report import draw_curves

    losses = (1, float("nan")), (2, 1.0)
    rows = [{"step": step, "loss": loss, "lr": 0.1, "tokens_per_second": 5.0} for step, loss in losses]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(json_line, rows)))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_tensorboard_reads_what_was_written_around_a_full_disk(tmp_path, capsys):
    board = Board(tmp_path, 0)
    board.write({"loss": 1.0}, 1)
    with room_for(sum(path.stat().st_size for path in tmp_path.iterdir()) + 20):
        board.write({"loss": 2.0}, 2)
        assert scalars(tmp_path) == {1: 1.0}
    board.write({"loss": 3.0}, 3)
    board.close()
    assert scalars(tmp_path) == {1: 1.0, 2: 2.0, 3: 3.0}


def test_tensorboard_shows_the_steps_that_a_resumed_run_did_again(tmp_path):
    for first, losses in ((0, [1.0, 2.0, 3.0]), (1, [5.0])):
        board = Board(tmp_path, first)
        for step, loss in enumerate(losses, start=first + 1):
            board.write({"loss": loss}, step)
        board.close()
    assert scalars(tmp_path) == {1: 1.0, 2: 5.0}


def test_rows_beyond_the_checkpoint_are_cut_in_place(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES) + b'{"step": 9, "lo')
    with room_for(0):  # it needs no room
        keep_steps(path, 8)
        assert path.read_bytes() == b"".join(LINES)
        keep_steps(path, 3)
    assert path.read_bytes() == b"".join(LINES[:3])
    keep_steps(path, 0)
    assert path.read_bytes() == b""
    keep_steps(tmp_path / "none.jsonl", 0)


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path):
    path = tmp_path / "config.yaml"
    write_whole(path, "old")
    with room_for(2), pytest.raises(OSError):
        write_whole(path, "new one")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"] and path.read_text() == "old"


PRINTING = """
import sys, time
from nvlm.runs.sinks import steady_streams
from rich.console import Console
from rich.progress import Progress
steady_streams()
for number in range(30000):  # more than a pipe holds, so that some come after its reader has gone
    print("line", number)
Console().print("a table")
with Progress() as bar:
    for step in bar.track(range(3)):
        pass
print("still here", file=sys.stderr)
"""


@pytest.mark.parametrize("shell", ["{} > /dev/full", "set -o pipefail; {} | head -n 1", "{} >&-", "{} > out"])
def test_no_print_ends_the_run(tmp_path, shell):
    (tmp_path / "printing.py").write_text(PRINTING)
    command = shell.format(f"{sys.executable} printing.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    told = done.stderr.splitlines()
    assert done.returncode == 0 and told[-1] == "still here", done.stderr
    broken = "full" in shell or "head" in shell
    assert len(told) == 1 + broken and broken == told[0].startswith("standard output cannot be written ("), told
