"""The charts of a report: which lines go into which panels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nvlm.report.cells import Cell, Grid
from nvlm.report.history import smoothed
from nvlm.report.plots import SERIES, Line, Panel, bounds, draw, exponent, mean_curve, thinned
from nvlm.report.runs import DONE, Run

Curve = tuple[np.ndarray, np.ndarray]
_WINDOW = 0.03  # of a run's steps: losses are means over as many
_FIRST = 2  # colours before are those of baselines
_TILINGS = {"one tile": 0, "no tag": 1, "2-D grid": 2, "2-D box": 3, "1-D": 4}  # the same colours in all reports


@dataclass(frozen=True, slots=True)
class Chart:
    """A panel, drawn: its title and its SVG."""

    title: str
    svg: str


def loss_curve(run: Run, over: str) -> Curve:
    """The smoothed training loss over "samples" or "flops"."""
    steps = run.steps
    return getattr(steps, over), smoothed(steps.loss, max(1, round(_WINDOW * len(steps))))


def score_curve(run: Run, task: str, over: str) -> Curve:
    """The scores of a task over what was trained until then."""
    found = [one for one in run.evaluations if one.task == task]
    x = np.array([run.steps.at(one.step, over) for one in found], dtype=float)
    return x, np.array([one.overall.mean for one in found], dtype=float)


def rows_of(grid: Grid, curve: Callable[[Run], Curve], over: str, first: int, **settings) -> list[Chart]:
    """A panel for each row, with a line for each column; for one column, a single panel."""
    if not grid.titled:
        return columns_of(grid, curve, over, first, **settings)
    panels = [
        (row, [(cell, cell.column, _colour(grid, cell.column)) for cell in grid.cells if cell.row == row])
        for row in grid.rows
    ]
    return _drawn(panels, curve, over, first, **settings)


def _colour(grid: Grid, column: str) -> int:
    """A column's colour."""
    return _TILINGS.get(column, _FIRST + grid.columns.index(column))


def columns_of(grid: Grid, curve: Callable[[Run], Curve], over: str, first: int, **settings) -> list[Chart]:
    """A panel for each column, with a line for each row."""
    panels = [
        (
            column,
            [(cell, cell.row, _FIRST + grid.rows.index(cell.row)) for cell in grid.cells if cell.column == column],
        )
        for column in grid.columns
    ]
    return _drawn(panels, curve, over, first, **settings)


def _drawn(
    panels: Sequence[tuple[str, Sequence[tuple[Cell, str, int]]]],
    curve: Callable[[Run], Curve],
    over: str,
    first: int,
    **settings,
) -> list[Chart]:
    curves = {id(run): curve(run) for _, cells in panels for cell, _, _ in cells for run in cell.runs}
    power = exponent(max((float(x.max()) for x, _ in curves.values() if len(x)), default=1))
    lines = {
        title: tuple(
            _line(label, colour, cell, [_scaled(curves[id(run)], power) for run in cell.runs])
            for cell, label, colour in cells
        )
        for title, cells in panels
    }
    return finished(lines, f"{over}{_told(power)}", first, **settings)


def finished(lines: Mapping[str, Sequence[Line]], x_title: str, first: int, **settings) -> list[Chart]:
    """The panels of `lines` by title, with the same limits. Their numbers begin with `first`."""
    drawn = {title: tuple(line for line in one if len(line.mean[0])) for title, one in lines.items()}
    limits = bounds([line for one in drawn.values() for line in one], settings.get("log", False))
    return [
        Chart(title, draw(Panel(title, one, x_title, limits, **settings), first + number))
        for number, (title, one) in enumerate(drawn.items())
        if one
    ]


def _scaled(curve: Curve, power: int) -> Curve:
    x, y = thinned(*curve)
    return x / 10**power, y


def _line(label: str, colour: int, cell: Cell, curves: Sequence[Curve]) -> Line:
    """Its mean is that of the runs that are done, if any is: it would end where the shortest run ends."""
    done = [curve for run, curve in zip(cell.runs, curves) if run.status == DONE]
    kept = tuple(curve for curve in curves if len(curve[0]))
    return Line(label, colour % SERIES, kept, mean_curve(done or kept))


_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _told(power: int) -> str:
    return {0: "", 3: ", thousands", 6: ", millions"}.get(power, f", 10{str(power).translate(_SUPERSCRIPTS)}")


def by_tiles(
    grid: Grid, means: Mapping[tuple[str, str], Mapping[int, float]], first: int, percent: bool
) -> list[Chart]:
    """Scores by the number of tiles. `means`: by cell and number."""
    lines: dict[str, list[Line]] = {}
    for row in grid.rows:
        for column in grid.columns:
            found = means.get((row, column), {})
            x, y = np.array(sorted(found), dtype=float), np.array([found[n] for n in sorted(found)], dtype=float)
            title, label = (row, column) if grid.titled else ("", row)
            colour = _colour(grid, column) if grid.titled else _FIRST + grid.rows.index(row)
            lines.setdefault(title, []).append(Line(label, colour % SERIES, (), (x, y)))
    return finished(lines, "regular tiles", first, percent=percent, dots=True, whole_x=True)
