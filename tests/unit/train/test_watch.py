"""The watchdog's verdict on beats of a pipeline of four, and where it locates a thread."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import pytest

from nvlm.train import watch
from nvlm.train.watch import Beat, diagnose, position, waits

LIMIT = 30.0
WELL = Beat(9, "tensor 0, pipeline 0, context 0, data 0", 5, "forward-backward", 7, 1.0, LIMIT, False, "step.py:7", "")
WAITS = replace(WELL, idle=31.0, waiting=True, where="parallel.py:9", stack="in wait\n")
HANGS = replace(WELL, idle=31.0, where="loader.py:53", stack="in read\n")


def pipeline(*beats: Beat) -> list[Beat]:
    """The beats with their places."""
    return [replace(beat, place=f"tensor 0, pipeline {n}, context 0, data 0") for n, beat in enumerate(beats)]


def test_all_is_well_while_all_move():
    assert diagnose(pipeline(WELL, WELL), [0, 0]) is None
    assert diagnose(pipeline(WELL, replace(WELL, idle=LIMIT)), [0, 0]) is None
    assert diagnose(pipeline(replace(HANGS, limit=4 * LIMIT)), [0]) is None  # a first step may take longer


def test_the_one_that_does_not_wait_is_it():
    text = diagnose(pipeline(WAITS, HANGS, WAITS, WAITS), [0, 0, 0, 0])
    assert text == (
        "rank 1 of 4 (tensor 0, pipeline 1, context 0, data 0) has hung in phase forward-backward of step 5 for 31 s "
        "at loader.py:53; the others wait for it\nin read\n"
    )


def test_it_is_found_while_only_those_that_wait_are_late():
    text = diagnose(pipeline(WAITS, replace(HANGS, idle=29.0)), [0, 0])
    assert text.startswith("rank 1 of 2")


def test_whoever_is_further_on_is_not_blamed():
    """On a GPU, a rank may wait for a collective in any call that needs its result, which no frame shows."""
    text = diagnose(pipeline(replace(HANGS, marks=8, phase="optimizer"), HANGS), [0, 0])
    assert "rank 1 of 2" in text
    assert "rank 0 of 2" not in text


def test_one_without_beats_is_named_first():
    text = diagnose(pipeline(WAITS, WAITS, WELL), [0, 0, 30])
    assert text.startswith("rank 2 of 3 (tensor 0, pipeline 2, context 0, data 0) has not answered for 30 s")
    assert "rank 1" not in text


def test_one_that_was_last_seen_at_its_start_is_not_given_the_time_of_a_start():
    started = replace(WAITS, step=0, phase="start", marks=0, limit=4 * LIMIT)
    text = diagnose(pipeline(WAITS, started), [0, 31])
    assert text.startswith("rank 1 of 2 (tensor 0, pipeline 1, context 0, data 0) has not answered for 31 s")


def test_if_all_wait_all_are_listed():
    text = diagnose(pipeline(WAITS, replace(WAITS, step=6, where="heldout.py:80")), [0, 0])
    assert text.startswith("all ranks have waited in collectives for 31 s, but not all in the same one")
    assert "rank 0 of 2 (tensor 0, pipeline 0, context 0, data 0) waits in phase forward-backward of step 5" in text
    assert "step 6 at heldout.py:80" in text


def test_a_frame_tells_where_and_whether_it_waits():
    here = sys._getframe()
    assert position(here) == f"test_watch.py:{here.f_lineno}"
    assert not waits(here)
    names = {"frame": sys._getframe}
    for file, expected in (("/x/torch/distributed/distributed_c10d.py", True), ("/x/torch/nn/functional.py", False)):
        exec(compile("got = frame()", file, "exec"), names)
        assert waits(names["got"]) is expected


def test_a_rank_that_was_stopped_before_its_first_beat_is_named(monkeypatch, capsys):
    """A rank may be stopped within the first steps, before anything of it has reached the store."""

    class Empty:
        def set(self, key: str, value: str) -> None: ...

        def check(self, keys: list[str]) -> bool:
            return False

    def ended(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(watch, "coordinates", lambda: "tensor 0")
    monkeypatch.setattr(watch.os, "_exit", ended)
    long_ago = time.monotonic() - 100
    dog = watch.Watchdog(1.0, 0, 2)
    dog._judge(Empty())  # at the start all is well
    dog.mark(1, "data")
    dog.mark(5, "vision")
    dog._last, dog._seen[1] = (*dog._last[:3], long_ago), (dog._seen[1][0], long_ago)
    with pytest.raises(SystemExit):
        dog._judge(Empty())
    assert capsys.readouterr().err.startswith("rank 1 of 2 (not heard from yet) has not answered for 100 s")
