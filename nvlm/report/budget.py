"""What runs cost, and what they reached with the same number of samples or of FLOPs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import numpy as np

from nvlm.report.cells import Cell, Grid
from nvlm.report.charts import loss_curve, score_curve
from nvlm.report.runs import DONE, Run

_SAME = 0.01  # amounts that differ by less are equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Medians over a cell's finished runs; NaN where nothing was logged. `memory`: bytes, peak of the first process;
    `flops_per_second`: of one process."""

    samples: float
    flops: float
    seconds: float
    samples_per_second: float
    tokens_per_second: float
    tiles_per_second: float
    flops_per_sample: float
    flops_per_second: float
    memory: float


def cost(cell: Cell) -> Cost | None:
    """The cell's cost; None without a finished run."""
    runs = [run.steps for run in cell.runs if run.status == DONE and len(run.steps)]
    if not runs:
        return None
    samples, flops = (median(steps.total(name) for steps in runs) for name in ("samples", "flops"))
    tokens, tiles, tflops = (
        median(steps.typical(name) for steps in runs) for name in ("tokens_per_second", "tiles_per_second", "tflops")
    )
    return Cost(
        samples=samples,
        flops=flops,
        seconds=median(steps.total("seconds") for steps in runs),
        samples_per_second=median(steps.typical("samples_per_second") for steps in runs),
        tokens_per_second=tokens,
        tiles_per_second=tiles,
        flops_per_sample=flops / samples if samples else math.nan,
        flops_per_second=1e12 * tflops,
        memory=median(steps.peak_memory() for steps in runs),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What the runs of a column reached with the same `amount` of samples or FLOPs: the mean over seeds, the least and
    the greatest, by row."""

    column: str
    amount: float
    values: dict[str, tuple[float, float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Equal:
    """All columns at equal `over` ("samples" or "flops"). `scores`: values are scores of the task, else training
    losses, because not every run was evaluated often enough."""

    over: str
    scores: bool
    columns: tuple[Reached, ...]


def equal(grid: Grid, task: str | None, over: str) -> Equal:
    """What all finished runs reached with the least amount that a run of the same column had."""
    amounts = {column: _least(grid, column, over) for column in grid.columns}
    if task:
        scores = [
            _reached(grid, column, amount, lambda run: score_curve(run, task, over))
            for column, amount in amounts.items()
            if amount
        ]
        if scores and all(scores):
            return Equal(over=over, scores=True, columns=tuple(one for one in scores if one))
    losses = [
        _reached(grid, column, amount, lambda run: loss_curve(run, over))
        for column, amount in amounts.items()
        if amount
    ]
    return Equal(over=over, scores=False, columns=tuple(one for one in losses if one))


def _finished(cell: Cell) -> list[Run]:
    return [run for run in cell.runs if run.status == DONE and len(run.steps)]


def _least(grid: Grid, column: str, over: str) -> float | None:
    totals = [run.steps.total(over) for cell in grid.cells if cell.column == column for run in _finished(cell)]
    return min(totals, default=None)


def _reached(grid: Grid, column: str, amount: float, curve) -> Reached | None:
    """None if some run's curve does not extend to `amount`."""
    values = {}
    for cell in grid.cells:
        runs = _finished(cell)
        if cell.column != column or not runs:
            continue
        found = [value_at(*curve(run), amount) for run in runs]
        if not all(map(math.isfinite, found)):
            return None
        values[cell.row] = (float(np.mean(found)), min(found), max(found))
    return Reached(column=column, amount=amount, values=values)


def value_at(x: np.ndarray, y: np.ndarray, amount: float) -> float:
    """The curve at `amount`, interpolated between its points; NaN outside them."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if not len(x) or amount < x[0] * (1 - _SAME) or amount > x[-1] * (1 + _SAME):
        return math.nan
    return float(np.interp(amount, x, y))
