"""The watchdog: a thread in each rank that reports its progress, so that a rank that hangs is found and named.

Each rank writes a Beat to the run's TCPStore, through the thread's own client. Rank 0 reads them all and decides; the
other ranks watch rank 0. The thread reads the main thread's Python frames, so a beat also shows where a main thread
that never returns is stuck.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType

import torch.distributed as dist
from megatron.core import parallel_state

from nvlm.processes import device
from nvlm.processes.workers import EXPLAINED

_UNHEARD = -1  # the number of a beat that never came
_PATIENCE = 4  # factor on the timeout for start-up and the first step, which build and compile
_EARLY = 0.9  # share of the timeout after which to report, so that the report comes within it
# On CPU, nvlm.processes.device intercepts every torch call and so is in every stack.
_LIBRARIES = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], device.__file__, "<")


@dataclass(frozen=True, slots=True)
class Beat:
    """One rank's heartbeat. Times in seconds."""

    count: int  # number of this beat; it stops growing when the rank is stopped or gone
    place: str  # coordinates in the parallel layout
    step: int
    phase: str
    marks: int  # calls of `mark` so far: the rank's progress
    idle: float  # time since the last mark
    limit: float  # the longest `idle` allowed
    waiting: bool  # the main thread is inside a collective
    where: str  # file:line of the main thread
    stack: str  # of the main thread, once it has been idle for long
    over: bool = False  # rank 0 is ending the run


def diagnose(beats: Sequence[Beat], silent: Sequence[float]) -> str | None:
    """Which ranks hold up the run, or None if all is well. `silent`: seconds since each rank's last beat."""
    ages = [beat.idle + quiet for beat, quiet in zip(beats, silent)]
    if all(age <= beat.limit for beat, age in zip(beats, ages)):
        return None
    # A rank may have died during start-up, which has a longer limit; once others are past it, theirs applies.
    limit = min(beat.limit for beat in beats)
    mute = [rank for rank in range(len(beats)) if silent[rank] > limit / 2]
    if mute:
        return "\n".join(_mute(rank, beats, silent[rank]) for rank in mute)
    alone = [rank for rank, beat in enumerate(beats) if not beat.waiting and ages[rank] > beat.limit / 2]
    if not alone:
        return _mismatch(beats, ages)
    least = min(beats[rank].marks for rank in alone)  # those further on are waiting too, though no frame shows it
    behind = [rank for rank in alone if beats[rank].marks == least]
    others = "; the others wait for it" if len(behind) == 1 < len(beats) else ""
    return "\n".join(
        f"{_who(rank, beats)} has hung in {_doing(beats[rank])} for {ages[rank]:.0f} s at {beats[rank].where}{others}\n"
        f"{beats[rank].stack}"
        for rank in behind
    )


def _who(rank: int, beats: Sequence[Beat]) -> str:
    return f"rank {rank} of {len(beats)} ({beats[rank].place})"


def _doing(beat: Beat) -> str:
    return f"phase {beat.phase} of step {beat.step}"


def _mute(rank: int, beats: Sequence[Beat], silent: float) -> str:
    return (
        f"{_who(rank, beats)} has not answered for {silent:.0f} s: its process or machine is stopped or gone; it was "
        f"last seen in {_doing(beats[rank])} at {beats[rank].where}"
    )


def _mismatch(beats: Sequence[Beat], ages: Sequence[float]) -> str:
    """All ranks wait, so they cannot be in the same collective: list where each waits."""
    lines = [f"all ranks have waited in collectives for {max(ages):.0f} s, but not all in the same one"]
    for rank, beat in enumerate(beats):
        lines.append(f"{_who(rank, beats)} waits in {_doing(beat)} at {beat.where}\n{beat.stack}")
    return "\n".join(lines)


def coordinates() -> str:
    """This rank's coordinates in the parallel layout."""
    return (
        f"tensor {parallel_state.get_tensor_model_parallel_rank()}, "
        f"pipeline {parallel_state.get_pipeline_model_parallel_rank()}, "
        f"context {parallel_state.get_context_parallel_rank()}, "
        f"data {parallel_state.get_data_parallel_rank()}"
    )


def waits(frame: FrameType) -> bool:
    """True if `frame`, the innermost of its thread, is inside a collective of torch or Megatron."""
    file = frame.f_code.co_filename
    if "/torch/distributed/" in file:
        return True
    return "/megatron/core/" in file and ".wait(" in linecache.getline(file, frame.f_lineno)


def position(frame: FrameType) -> str:
    """file:line of the innermost frame outside the libraries."""
    own: FrameType | None = frame
    while own is not None and own.f_code.co_filename.startswith(_LIBRARIES):
        own = own.f_back
    shown = own or frame
    return f"{os.path.basename(shown.f_code.co_filename)}:{shown.f_lineno}"


class Watchdog:
    """Context manager around a run. Ends the process if nothing progresses for `timeout` seconds."""

    def __init__(self, timeout: float, rank: int, world: int) -> None:
        self._limit, self._rank, self._world = _EARLY * timeout, rank, world
        self._interval = min(5.0, timeout / 20)
        self._place = coordinates()
        self._main = threading.get_ident()
        self._done = threading.Event()
        self._count, self._first = 0, 0
        self._last = (0, "start", 0, time.monotonic())
        self._answered = time.monotonic()
        self._seen: list[tuple[int, float]] = [(_UNHEARD, time.monotonic())] * world
        jobs = [self._exchange] if rank == 0 else [self._exchange, self._await_store]
        self._threads = [threading.Thread(target=job, name="watchdog", daemon=True) for job in jobs]

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        for thread in self._threads:  # a thread still inside the store when Python exits would abort the process
            thread.join(self._limit)

    def mark(self, step: int, phase: str) -> None:
        """Report progress: `phase` of `step` begins."""
        self._first = self._first or step
        self._last = (step, phase, self._last[2] + 1, time.monotonic())

    def _exchange(self) -> None:
        with contextlib.suppress(dist.DistError):  # _await_store then ends the process
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=self._limit))
            over = False
            while not over:  # the first beat comes at once: a rank may be stopped within the first interval
                self._judge(store) if self._rank == 0 else self._follow(store)
                self._answered = time.monotonic()
                over = self._done.wait(self._interval)

    def _await_store(self) -> None:
        """End the process if the store stops answering. It lives in rank 0: if that is stopped, calls never return."""
        while not self._done.wait(self._interval):
            silent = time.monotonic() - self._answered
            if silent > self._limit:
                self._end(
                    f"rank 0 of {self._world} has not answered for {silent:.0f} s: its process or machine is stopped "
                    f"or gone"
                )

    def _judge(self, store: dist.Store) -> None:
        own = self._beat()
        store.set("beat/0", json.dumps(asdict(own)))
        beats = [own, *(self._read(store, rank) or self._unheard() for rank in range(1, self._world))]
        text = diagnose(beats, [self._silent(r, b) for r, b in enumerate(beats)])
        if text and not self._done.is_set():
            store.set("beat/0", json.dumps(asdict(own) | {"over": True}))
            print(text, file=sys.stderr, flush=True)
            time.sleep(2 * self._interval)  # so that the others read it
            os._exit(EXPLAINED)

    def _follow(self, store: dist.Store) -> None:
        store.set(f"beat/{self._rank}", json.dumps(asdict(self._beat())))
        first = self._read(store, 0)
        if first and first.over:
            os._exit(EXPLAINED)
        if first and self._silent(0, first) > first.limit:
            self._end(f"rank 0 of {self._world} ({first.place}) has not answered for {self._silent(0, first):.0f} s")

    def _end(self, text: str) -> None:
        if self._rank == 1:  # one rank reporting is enough
            print(text, file=sys.stderr, flush=True)
        os._exit(EXPLAINED)

    def _read(self, store: dist.Store, rank: int) -> Beat | None:
        key = f"beat/{rank}"
        return Beat(**json.loads(store.get(key))) if store.check([key]) else None

    def _unheard(self) -> Beat:
        """Stands for a rank that has not sent a beat since this run began."""
        return Beat(_UNHEARD, "not heard from yet", 0, "start", 0, 0.0, _PATIENCE * self._limit, False, "its start", "")

    def _silent(self, rank: int, beat: Beat) -> float:
        """Seconds, by this rank's clock, since the beat of `rank` last changed."""
        count, since = self._seen[rank]
        if beat.count != count:
            since = time.monotonic()
            self._seen[rank] = (beat.count, since)
        return time.monotonic() - since

    def _beat(self) -> Beat:
        self._count += 1
        step, phase, marks, since = self._last
        idle = time.monotonic() - since
        limit = self._limit * (_PATIENCE if step <= self._first else 1)
        frame = sys._current_frames()[self._main]
        stack = "".join(traceback.format_stack(frame)) if idle > limit / 4 else ""
        innermost = (waits(frame), position(frame))
        return Beat(self._count, self._place, step, phase, marks, idle, limit, *innermost, stack)
