"""What the cells scored, and how certain their differences are.

Runs of a cell differ in their seed. A seed may bring its own questions (generated pages depend on it) or not (a
benchmark has the same for all); intervals cover the choice of questions and of seeds in either case. Differences are
paired: two cells are compared on the questions that both answered with the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from nvlm.metrics.intervals import Interval, over_seeds, paired_over_seeds
from nvlm.report.answers import Answer
from nvlm.report.cells import Cell, Grid

CERTAIN = 0.05

Scores = Mapping[int, Mapping[str, float]]
"""Scores by seed and by the question's id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """By how much `this` scores more than `base`, both as (row, column), on `count` questions in `seeds` seeds.

    `better`, `worse`: questions; `p`: of the two-sided sign test on them; `holm`: p, adjusted for all gaps of its
    table.
    """

    this: tuple[str, str]
    base: tuple[str, str]
    mean: float
    low: float
    high: float
    count: int
    seeds: int
    better: int
    worse: int
    p: float
    holm: float = math.nan
    partial: bool = False  # some questions of one were not asked of the other

    @property
    def certain(self) -> bool:
        """Whether both agree that there is a difference: the interval and the adjusted sign test."""
        return (self.low > 0 or self.high < 0) and self.holm < CERTAIN


def scores_of(
    cell: Cell, task: str, keep: Callable[[int, Answer], bool] = lambda seed, answer: True
) -> dict[int, dict[str, float]]:
    """The scores of the cell's finished runs, of the answers to `keep`; without seeds that have none."""
    found = {run.config.seed: run.last(task) for run in cell.runs}
    scores = {
        seed: {name: answer.score for name, answer in last.answers.items() if keep(seed, answer)}
        for seed, last in found.items()
        if last
    }
    return {seed: one for seed, one in scores.items() if one}


def interval(scores: Scores) -> Interval | None:
    """The mean over seeds and questions, each seed with the same weight; None without any score."""
    if not scores:
        return None
    values, same = _aligned(scores)
    found = over_seeds(values, same)
    if _shares(values):
        return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))
    return found


def _shares(values: Sequence[Sequence[float]]) -> bool:
    """Whether all scores are between 0 and 1. Then a mean is, too, but the bounds of its interval need not be."""
    return all(0 <= score <= 1 for one in values for score in one)


def gap(this: Scores, base: Scores, names: tuple[tuple[str, str], tuple[str, str]]) -> Gap | None:
    """The paired difference; None if the two share no question. `names`: (row, column) of both."""
    pairs = {seed: (this[seed], base[seed]) for seed in this if seed in base}
    common = {seed: [name for name in one if name in other] for seed, (one, other) in pairs.items()}
    common = {seed: names for seed, names in common.items() if names}
    if not common:
        return None
    first, same = _aligned({seed: {name: this[seed][name] for name in found} for seed, found in common.items()})
    second, _ = _aligned({seed: {name: base[seed][name] for name in found} for seed, found in common.items()})
    found = paired_over_seeds(first, second, same)
    most = 1.0 if _shares(first) and _shares(second) else math.inf
    return Gap(
        this=names[0],
        base=names[1],
        mean=found.mean,
        low=max(found.low, -most),
        high=min(found.high, most),
        count=len(first[0]) if same else sum(map(len, first)),
        seeds=len(common),
        better=found.better,
        worse=found.worse,
        p=found.p,
        partial=any(a.keys() != b.keys() for a, b in pairs.values()),
    )


def _aligned(scores: Scores) -> tuple[list[list[float]], bool]:
    """The scores of each seed, and whether all seeds answered the same questions; then these are in the same order."""
    every = list(scores.values())
    if same := all(one.keys() == every[0].keys() for one in every):
        return [[one[name] for name in every[0]] for one in every], same
    return [list(one.values()) for one in every], same


def adjusted(gaps: Sequence[Gap]) -> list[Gap]:
    """`gaps` with Holm's p (1979): each is certain at a level only if all smaller ones are."""
    holm, highest = {}, 0.0
    for place, number in enumerate(sorted(range(len(gaps)), key=lambda number: gaps[number].p)):
        highest = max(highest, min(1.0, gaps[number].p * (len(gaps) - place)))
        holm[number] = highest
    return [replace(one, holm=holm[number]) for number, one in enumerate(gaps)]


def column_gaps(grid: Grid, scores: Mapping[tuple[str, str], Scores]) -> list[Gap]:
    """Each column against the base column, within each row."""
    pairs = [((row, column), (row, grid.base_column)) for row in grid.rows for column in grid.columns]
    return _gaps([pair for pair in pairs if pair[0] != pair[1]], scores)


def row_gaps(grid: Grid, scores: Mapping[tuple[str, str], Scores]) -> list[Gap]:
    """Each row against every row before it that differs in one axis alone, within each column."""
    pairs = [
        ((row, column), (before, column))
        for column in grid.columns
        for number, row in enumerate(grid.rows)
        for before in grid.rows[:number]
        if sum(one != other for one, other in zip(grid.parts[row], grid.parts[before])) == 1
    ]
    return _gaps(pairs, scores)


def _gaps(
    pairs: Sequence[tuple[tuple[str, str], tuple[str, str]]], scores: Mapping[tuple[str, str], Scores]
) -> list[Gap]:
    found = [gap(scores[this], scores[base], (this, base)) for this, base in pairs if this in scores and base in scores]
    return adjusted([one for one in found if one])
