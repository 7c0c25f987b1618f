"""How far the runs of a sweep are, read from their metrics.jsonl, and the time that is left. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvlm.sweep.ledger import Row

_TAIL = 64 * 2**10  # bytes: some rows
_ROWS = 20  # of which the duration of a step is the mean


@dataclass(frozen=True, slots=True)
class At:
    """The last logged step of a run, its loss (None if it is not finite), and the duration of a step in seconds."""

    step: int
    loss: float | None
    seconds: float


def at(folder: Path) -> At | None:
    """How far the run in `folder` is; None before its first step."""
    rows = _last_rows(folder / "metrics.jsonl")
    if not rows:
        return None
    return At(int(rows[-1]["step"]), rows[-1]["loss"], sum(float(row["seconds"]) for row in rows) / len(rows))


def time_left(rows: Collection[Row], going: Sequence[tuple[float, At | None, int]], side_by_side: int) -> float | None:
    """Seconds until all runs have ended; None if nothing is known yet.

    `going`: of each running run its seconds so far, how far it is, and its steps. A run that waits takes as long as
    finished ones do on average or, before one has finished, as the running ones are expected to take.
    """
    rests = [max(0.0, (steps - here.step) * here.seconds) for _, here, steps in going if here is not None]
    known = [row.seconds for row in rows if row.status == "done" and row.seconds]
    if not known:
        known = [spent + rest for (spent, here, _), rest in zip([g for g in going if g[1] is not None], rests)]
    if not known:
        return None
    usual = sum(known) / len(known)
    fresh = [max(0.0, usual - spent) for spent, here, _ in going if here is None]
    waiting = usual * sum(row.status == "waiting" for row in rows)
    rests += fresh
    return max([(sum(rests) + waiting) / max(1, side_by_side), *rests])


def _last_rows(path: Path) -> list[dict]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - _TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines[-_ROWS - 2 :]:
        try:
            row = json.loads(line)
        except ValueError:  # cut off by _TAIL, or still being written
            continue
        if isinstance(row, dict) and {"step", "loss", "seconds"} <= row.keys():
            rows.append(row)
    return rows[-_ROWS:]
