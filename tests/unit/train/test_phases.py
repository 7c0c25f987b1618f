"""A step's phases: timed without gaps and reported to the watchdog."""

from __future__ import annotations

import time

import pytest

from nvlm.train.phases import Phases


def test_phases_are_timed_one_behind_the_other():
    heard = []
    with Phases(lambda step, phase: heard.append((step, phase))) as mark:
        begin = time.perf_counter()
        mark(1, "data")
        time.sleep(0.02)
        mark(1, "vision")
        time.sleep(0.06)
        mark(1, "log")
        first = mark.lap()
        middle = time.perf_counter()
        time.sleep(0.04)  # behind the lap: the next one's
        mark(2, "data")
        mark(2, "log")
        second = mark.lap()
        end = time.perf_counter()
    assert heard == [(1, "data"), (1, "vision"), (1, "log"), (2, "data"), (2, "log")]
    assert list(first) == ["data", "vision", "log"]
    assert first["data"] >= 0.02 and first["vision"] >= 0.06 and first["log"] < 0.02
    assert second["log"] >= 0.04 and second["data"] < 0.02
    assert sum(first.values()) + sum(second.values()) == pytest.approx(end - begin, abs=5e-3)
    assert sum(first.values()) == pytest.approx(middle - begin, abs=5e-3)
