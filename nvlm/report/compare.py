"""What the cells scored, and how certain their differences are.

Runs of a cell differ in their seed. A seed may bring its own questions (generated pages depend on it) or not (a
benchmark has the same for all); intervals resample seeds and questions in either case. Differences are paired: two
cells are compared on the questions that both answered with the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nvlm.metrics.intervals import LEVEL, TIE, Interval, sign_test
from nvlm.report.answers import Answer
from nvlm.report.cells import Cell, Grid

DRAWS, _MOST, _LEAST = 10_000, 1_000_000, 1_000  # resamples; numbers drawn for an interval; resamples at least
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
    mean, low, high = _resampled(_tables(scores))
    return Interval(mean=mean, low=low, high=high, count=sum(map(len, scores.values())))


def gap(this: Scores, base: Scores, names: tuple[tuple[str, str], tuple[str, str]]) -> Gap | None:
    """The paired difference; None if the two share no question. `names`: (row, column) of both."""
    pairs = {seed: (this[seed], base[seed]) for seed in this if seed in base}
    differences = {seed: {q: a[q] - b[q] for q in a if q in b} for seed, (a, b) in pairs.items()}
    differences = {seed: one for seed, one in differences.items() if one}
    if not differences:
        return None
    tables = _tables(differences)
    mean, low, high = _resampled(tables)
    # A question that all seeds were asked counts once, by its mean.
    questions = np.concatenate([table.mean(axis=1) for table in tables])
    better, worse = int((questions > TIE).sum()), int((questions < -TIE).sum())
    return Gap(
        this=names[0],
        base=names[1],
        mean=mean,
        low=low,
        high=high,
        count=len(questions),
        seeds=len(differences),
        better=better,
        worse=worse,
        p=sign_test(better, worse),
        partial=any(a.keys() != b.keys() for a, b in pairs.values()),
    )


def _tables(scores: Scores) -> list[np.ndarray]:
    """Arrays [questions, seeds] to resample: one for all seeds if they share their questions, else one for each."""
    every = list(scores.values())
    if all(one.keys() == every[0].keys() for one in every):
        return [np.array([[one[name] for one in every] for name in every[0]])]
    return [np.array([[score] for score in one.values()]) for one in every]


def _resampled(tables: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """The mean over seeds and the bounds of its interval, from resampled questions and resampled seeds."""
    rng = np.random.default_rng(0)
    mean = float(np.mean([seed for table in tables for seed in table.mean(axis=0)]))
    patterns = [np.unique(table, axis=0, return_counts=True) for table in tables]
    width = sum(len(values) for values, _ in patterns)
    draws = max(_LEAST, min(DRAWS, _MOST // width))
    # A resample of n questions is a multinomial count of the distinct rows, which are few for scores of 0 and 1.
    means = np.concatenate(
        [
            rng.multinomial(counts.sum(), counts / counts.sum(), draws) @ values / counts.sum()
            for values, counts in patterns
        ],
        axis=1,
    )
    seeds = means.shape[1]
    chosen = rng.integers(seeds, size=(draws, seeds))
    if len(tables) > 1:  # a seed that is drawn twice brings other questions the second time
        slots = [means[rng.permutation(draws), chosen[:, slot]] for slot in range(seeds)]
        drawn = np.mean(slots, axis=0)
    else:
        drawn = np.take_along_axis(means, chosen, axis=1).mean(axis=1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean, float(low), float(high)


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
    """Each row against every row before it, within each column."""
    pairs = [
        ((row, column), (before, column))
        for column in grid.columns
        for number, row in enumerate(grid.rows)
        for before in grid.rows[:number]
    ]
    return _gaps(pairs, scores)


def _gaps(
    pairs: Sequence[tuple[tuple[str, str], tuple[str, str]]], scores: Mapping[tuple[str, str], Scores]
) -> list[Gap]:
    found = [gap(scores[this], scores[base], (this, base)) for this, base in pairs if this in scores and base in scores]
    return adjusted([one for one in found if one])
