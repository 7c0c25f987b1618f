"""The loop of a sweep: starts runs as shares become free, until all have ended or a signal came. Imports no torch."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import SubprocessError

from nvlm.config.values import ConfigError
from nvlm.processes.workers import Signals
from nvlm.runs.folder import steps_done
from nvlm.sweep.ledger import Row
from nvlm.sweep.process import LOG, Job, Running, kill, last_words, start
from nvlm.sweep.shares import Share

_POLL = 0.1  # seconds
_EXTRA = 10.0  # seconds after a run's own limit for stopping in which its launcher kills its workers


@dataclass(frozen=True, slots=True)
class State:
    """A sweep at one moment: what became of each run, by folder, the runs that are running, and whether a signal has
    asked them to save and end."""

    rows: dict[str, Row]
    running: tuple[Running, ...] = ()
    stopping: bool = False


def run_jobs(
    jobs: Sequence[Job],
    shares: Sequence[Share],
    where: Path,
    rows: dict[str, Row],
    keep: Callable[[dict[str, Row]], None],
    show: Callable[[State], None],
) -> tuple[dict[str, Row], int | None]:
    """Run `jobs` in this order, as many at a time as there are `shares`. A failed run ends only itself.

    `rows`: what is known of all runs of the sweep, by folder, with one for each job. `keep` is called with the rows
    whenever one changes, `show` at every look at the runs. Returns the rows and the signal that ended the sweep, if
    any: SIGTERM and SIGINT are passed on to the runs, which save and end; a second SIGINT kills them.
    """
    waiting, state = deque(jobs), State(rows)
    with Signals() as signals:
        deadline = math.inf
        try:
            while state.running or (waiting and not signals.came):
                before = state.rows
                if signals.came and deadline == math.inf:
                    deadline = _pass_on(state, signals.came[0])
                state = _ended(replace(state, stopping=bool(signals.came)), where)
                if not state.stopping:
                    state = _started(state, waiting, shares, where)
                if state.rows != before:
                    keep(state.rows)
                show(state)
                if time.monotonic() > deadline or signals.came.count(signal.SIGINT) > 1:
                    break
                time.sleep(_POLL)
        finally:
            for one in state.running:
                kill(one)
        state = _ended(replace(state, stopping=True), where)
        keep(state.rows)
        if signals.came:
            signals.obey()
    return state.rows, signals.came[0] if signals.came else None


def _pass_on(state: State, number: int) -> float:
    """Send the signal to all runs; returns when they must have ended."""
    for one in state.running:
        one.process.send_signal(number)
    return time.monotonic() + max((one.job.stop_seconds for one in state.running), default=0.0) + _EXTRA


def _started(state: State, waiting: deque[Job], shares: Sequence[Share], where: Path) -> State:
    """The state after jobs have been taken from `waiting` and started in all free shares."""
    rows, running = dict(state.rows), list(state.running)
    free = [share for share in shares if share not in [one.share for one in running]]
    while free and waiting:
        job = waiting.popleft()
        try:
            running.append(start(job, free[0], where))
        except (OSError, SubprocessError) as error:  # the latter: the share's cores no longer exist
            reason = f"it could not be started: {getattr(error, 'strerror', None) or error}"
            rows[job.folder] = replace(rows[job.folder], status="failed", reason=reason)
            continue
        rows[job.folder] = replace(rows[job.folder], status="running", reason="")
        del free[0]
    return replace(state, rows=rows, running=tuple(running))


def _ended(state: State, where: Path) -> State:
    """The state after the runs that have ended were looked at."""
    rows, running = dict(state.rows), []
    for one in state.running:
        if one.process.poll() is None:
            running.append(one)
            continue
        kill(one)
        row = rows[one.job.folder]
        outcome = _outcome(one, row, where, state.stopping)
        rows[row.folder] = replace(outcome, seconds=round(row.seconds + one.seconds, 1))
    return replace(state, rows=rows, running=tuple(running))


def _outcome(one: Running, row: Row, where: Path, stopping: bool) -> Row:
    folder, code = where / one.job.folder, one.process.returncode
    if stopping:  # it may have saved its last step and not have been evaluated
        return replace(row, status="waiting", reason="")
    try:
        complete = code == 0 and steps_done(folder) >= one.job.steps
    except ConfigError as error:  # its folder was tampered with
        return replace(row, status="failed", reason=str(error))
    if complete:
        return replace(row, status="done", reason="")
    return replace(row, status="failed", reason=last_words(folder / LOG, one.log_size, code))
