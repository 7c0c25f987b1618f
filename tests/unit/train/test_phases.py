"""A step's phases: timed without gaps and reported to the watchdog."""

from __future__ import annotations

import time

from nvlm.processes import device
from nvlm.train.phases import Phases


def test_phases_are_timed_one_behind_the_other(monkeypatch):
    now, heard = [0], []

    class Moment:
        def __init__(self) -> None:
            self.at = now[0]

        def passed(self) -> bool:
            return True

        def since(self, earlier: Moment) -> int:
            return self.at - earlier.at

    monkeypatch.setattr(device, "Moment", Moment)
    with Phases(lambda step, phase: heard.append((step, phase))) as mark:
        mark(1, "data")
        now[0] = 2
        mark(1, "vision")
        now[0] = 8
        mark(1, "log")
        first = mark.lap()
        now[0] = 12  # after the lap: counts for the next one
        mark(2, "data")
        now[0] = 13
        mark(2, "log")
        second = mark.lap()
    assert heard == [(1, "data"), (1, "vision"), (1, "log"), (2, "data"), (2, "log")]
    assert list(first.items()) == [("data", 2), ("vision", 6), ("log", 0)]
    assert list(second.items()) == [("log", 4), ("data", 1)]


def test_a_lap_reads_no_moment_that_the_gpu_has_not_reached(monkeypatch):
    """A stand-in for a GPU, whose time stands still until the host waits for it."""
    host, gpu = [0], [0]

    class Moment:
        def __init__(self) -> None:
            self.at = host[0]

        def passed(self) -> bool:
            return self.at <= gpu[0]

        def since(self, earlier: Moment) -> int:
            assert self.passed() and earlier.passed(), "this would wait for the GPU"
            return self.at - earlier.at

    def step(number: int, update: int) -> dict[str, float]:
        for phase in ("data", "vision", "forward-backward", "optimizer"):
            mark(number, phase)
            host[0] += 10
        gpu[0] = host[0]  # the host waits for the sums
        mark(number, "optimizer")
        host[0] += update
        mark(number, "log")
        return mark.lap()

    monkeypatch.setattr(device, "Moment", Moment)
    with Phases(lambda *_: None) as mark:
        first, second, third = step(1, update=3), step(2, update=5), step(3, update=7)
    alike = {"data": 10, "vision": 10, "forward-backward": 10}
    assert first == alike | {"optimizer": 10}
    assert second == alike | {"optimizer": 13, "log": 0}  # with the first step's update
    assert third == alike | {"optimizer": 15, "log": 0}


def test_moments_are_seconds_apart():
    earlier, began = device.Moment(), time.perf_counter()
    time.sleep(0.02)
    ended = time.perf_counter()
    assert device.Moment().since(earlier) >= ended - began >= 0.02
