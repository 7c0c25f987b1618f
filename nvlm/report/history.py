"""The steps of a run, from its metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WARM = 0.2  # share of the steps that is left out of medians of speed: compilation, caches, the first files


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """One entry per logged step. `samples`, `flops` and `seconds` are sums up to and including the step, over all
    processes; `memory`: bytes, the greatest peak so far; NaN where a value was not logged or not finite."""

    step: np.ndarray
    loss: np.ndarray
    updated: np.ndarray
    samples: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray
    samples_per_second: np.ndarray
    tokens_per_second: np.ndarray
    tiles_per_second: np.ndarray
    tflops: np.ndarray
    memory: np.ndarray

    def __len__(self) -> int:
        return len(self.step)

    @property
    def last(self) -> int:
        """The last step; 0 without any."""
        return int(self.step[-1]) if len(self) else 0

    def total(self, name: str) -> float:
        """The last value of a sum; 0 without any step."""
        return float(getattr(self, name)[-1]) if len(self) else 0.0

    def typical(self, name: str) -> float:
        """The median of a speed after the first steps; NaN if nothing was logged."""
        values = getattr(self, name)[int(WARM * len(self)) :]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else math.nan

    def peak_memory(self) -> float:
        """Bytes; NaN if the run did not log it."""
        known = self.memory[np.isfinite(self.memory)]
        return float(known.max()) if len(known) else math.nan

    def at(self, step: int, name: str) -> float:
        """A sum when `step` was done; NaN before the first logged step."""
        where = int(np.searchsorted(self.step, step, side="right")) - 1
        return float(getattr(self, name)[where]) if where >= 0 else math.nan


def read_steps(path: Path, processes: int) -> tuple[Steps, bool]:
    """The steps in the file `path`, and whether it is whole: a line that is cut short or damaged ends the reading.

    `processes`: of the run; `tflops` is logged per process. Without a file there are no steps.
    """
    rows, whole = _rows(path)
    return _steps(rows, processes), whole


def _rows(path: Path) -> tuple[list[dict], bool]:
    rows: list[dict] = []
    if not path.is_file():
        return rows, True
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                return rows, False
            rows.append(row)
    return rows, True


def _steps(rows: Sequence[Mapping], processes: int) -> Steps:
    seconds, tflops, samples = (_column(rows, name) for name in ("seconds", "tflops", "records"))
    return Steps(
        step=np.array([row["step"] for row in rows], dtype=np.int64),
        loss=_column(rows, "loss"),
        updated=np.array([row.get("updated", True) is True for row in rows], dtype=bool),
        samples=np.cumsum(np.nan_to_num(samples)),
        flops=np.cumsum(np.nan_to_num(tflops * seconds)) * 1e12 * processes,
        seconds=np.cumsum(np.nan_to_num(seconds)),
        samples_per_second=samples / np.where(seconds > 0, seconds, math.nan),
        tokens_per_second=_column(rows, "tokens_per_second"),
        tiles_per_second=_column(rows, "tiles_per_second"),
        tflops=tflops,
        memory=_column(rows, "peak_memory"),
    )


def _column(rows: Sequence[Mapping], name: str) -> np.ndarray:
    return np.array([_number(row.get(name)) for row in rows], dtype=np.float64)


def _number(value: object) -> float:
    """`value` as a number; NaN for what is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values at each place (fewer at the start), of those that are finite."""
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0.0), known))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    found = counts[end] - counts[start]
    return np.where(found > 0, (sums[end] - sums[start]) / np.maximum(found, 1), math.nan)
