"""What a sweep shows while it goes: a live table on a terminal, else a line for each change and one every minute.

Imports no torch.
"""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nvlm.sweep.ledger import Row
from nvlm.sweep.process import LOG, Running
from nvlm.sweep.progress import At, at, time_left
from nvlm.sweep.schedule import State

_TABLE_EVERY, _LINE_EVERY = 0.5, 60.0  # seconds
_FAILED = 8  # failed runs in the live table, the last ones


@contextmanager
def shown(where: Path, side_by_side: int, rows: dict[str, Row]) -> Iterator[Callable[[State], None]]:
    """A function that shows a state of the sweep in the folder `where`, which began with `rows`."""
    console = Console(highlight=False)
    if not console.is_terminal:
        yield Lines(console, where, side_by_side, rows)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:  # a refreshing thread must not meet forks
        last = -_TABLE_EVERY

        def show(state: State) -> None:
            nonlocal last
            if time.monotonic() - last >= _TABLE_EVERY:
                last = time.monotonic()
                live.update(table(state, where, side_by_side), refresh=True)

        yield show


class Lines:
    """Prints a line when the status of a run has changed, and a summary every minute."""

    def __init__(self, console: Console, where: Path, side_by_side: int, rows: dict[str, Row]) -> None:
        self.console, self.where, self.side_by_side, self.rows = console, where, side_by_side, dict(rows)
        self.due, self.stopping = time.monotonic() + _LINE_EVERY, False

    def __call__(self, state: State) -> None:
        """Show `state`."""
        for folder, row in state.rows.items():
            before = self.rows[folder]
            if row.status != before.status:
                self._print(f"{folder}: {_said(row, before)}")
        self.rows = dict(state.rows)
        if state.stopping and not self.stopping:
            self.due, self.stopping = 0.0, True
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + _LINE_EVERY
            progress = positions(state, self.where)
            going = [f"{one.job.folder} {_place(one, progress[one.job.folder])}" for one in state.running]
            self._print("; ".join([summary(state, self.where, self.side_by_side), *going]))

    def _print(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def positions(state: State, where: Path) -> dict[str, At | None]:
    """How far each running run is, by folder."""
    return {one.job.folder: at(where / one.job.folder) for one in state.running}


def summary(state: State, where: Path, side_by_side: int) -> str:
    """One line: how many runs are done, running, failed and waiting, and the time left."""
    rows = state.rows.values()
    count = Counter(row.status for row in rows)
    parts = [f"{count['done']} of {len(rows)} runs done"]
    parts += [f"{count[status]} {status}" for status in ("running", "failed", "waiting") if count[status]]
    if state.stopping:
        return ", ".join([*parts, "stopping as soon as these have saved"])
    progress = positions(state, where)
    going = [(one.seconds, progress[one.job.folder], one.job.steps) for one in state.running]
    if (left := time_left(rows, going, side_by_side)) is not None and (state.running or count["waiting"]):
        parts.append(f"about {duration(left)} left")
    return ", ".join(parts)


def table(state: State, where: Path, side_by_side: int) -> Group:
    """The running runs with step and loss, and the failed ones with the reason."""
    progress = positions(state, where)
    body = Table(box=None, pad_edge=False)
    for heading, justify in (("run", "left"), ("step", "right"), ("loss", "right"), ("time", "right"), ("", "left")):
        body.add_column(heading, justify=justify, overflow="fold", no_wrap=heading in ("step", "loss", "time"))
    for one in state.running:
        here = progress[one.job.folder]
        step, loss = (f"{here.step}/{one.job.steps}", _loss(here)) if here else (f"0/{one.job.steps}", "")
        body.add_row(Text(one.job.folder), step, loss, duration(one.seconds), "")
    failed = [row for row in state.rows.values() if row.status == "failed"]
    for row in failed[-_FAILED:]:
        body.add_row(
            Text(row.folder), "", "", duration(row.seconds), Text(f"failed: {shorten(row.reason, 120)}", style="red")
        )
    return Group(Text(summary(state, where, side_by_side), style="bold"), body)


def closing(rows: Sequence[Row], where: Path, command: str) -> list[str]:
    """The last lines of a sweep: what is done, which runs failed and why, and what to do about it."""
    left = [row for row in rows if row.status != "done"]
    lines = [f"{len(rows) - len(left)} of {len(rows)} runs done, in {where}"]
    failed = [row for row in left if row.status == "failed"]
    lines += [f"failed: {row.folder}: {row.reason} (log: {where / row.folder / LOG})" for row in failed]
    if len(left) < len(rows):
        lines.append(f"to compare them: python launch/report.py {shlex.quote(f'runs={where}')}")
    if left:
        lines.append(f"to do what is missing, and nothing else: {command}")
    return lines


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _said(row: Row, before: Row) -> str:
    if row.status == "done":
        return f"done in {duration(row.seconds)}"
    if row.status == "failed":
        return f"failed after {duration(row.seconds)}: {row.reason}"
    return "started" if row.status == "running" else "stopped" if before.status == "running" else row.status


def _place(one: Running, here: At | None) -> str:
    return f"step {here.step}/{one.job.steps} loss {_loss(here)}" if here else "starting"


def _loss(here: At) -> str:
    return "not finite" if here.loss is None else f"{here.loss:.3f}"
