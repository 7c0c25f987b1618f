"""How certain a mean is: bootstrap intervals, and paired differences between two runs. Imports no torch.

Scores are [questions], or [seeds, questions] for several runs that differ only in their seed. Two questions must not be
mixed up: whether this checkpoint is better than that one (`paired`: other questions could have been asked), and whether
this way of training is better (`paired_ways`: other seeds could have been used, too).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
TIE = 1e-9  # differences up to here are rounding
AT_ONCE = 1_000_000  # numbers drawn at a time

Scores = Sequence[float] | Sequence[Sequence[float]] | np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over `count` questions, and the bounds of its percentile bootstrap interval (Efron 1979)."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The mean of first minus second, and the bounds of its interval; on how many questions the first is `better` or
    `worse`; `p`: of the two-sided sign test on these, without ties."""

    mean: float
    low: float
    high: float
    better: int
    worse: int
    p: float


def bootstrap(scores: Scores, seed: int = 0) -> Interval:
    """The mean of `scores` with its 95% interval, from 10,000 resamples of questions. Raises ValueError without any."""
    values = _by_question(scores)
    low, high = _bounds(_resampled(values[None], np.random.default_rng(seed))[:, 0])
    return Interval(mean=float(values.mean()), low=low, high=high, count=len(values))


def paired(first: Scores, second: Scores, seed: int = 0) -> Difference:
    """How far `first` is ahead of `second` on the same questions, in the same order.

    With several seeds a question's scores are averaged over them first, and questions are resampled: the interval tells
    what other questions might have shown, of these very checkpoints.
    """
    return _difference(
        _by_question(first), _by_question(second), lambda gaps, rng: _resampled(gaps[None], rng)[:, 0], seed
    )


def _difference(one: np.ndarray, other: np.ndarray, resample, seed: int) -> Difference:
    if len(one) != len(other):
        raise ValueError(f"{len(one)} and {len(other)} questions")
    gaps = one - other
    low, high = _bounds(resample(gaps, np.random.default_rng(seed)))
    better, worse = int((gaps > TIE).sum()), int((gaps < -TIE).sum())
    p = sign_test(better, worse)
    return Difference(mean=float(gaps.mean()), low=low, high=high, better=better, worse=worse, p=p)


def sign_test(better: int, worse: int) -> float:
    """The probability that fair coins are at least as one-sided: two-sided, exact."""
    count, fewer = better + worse, min(better, worse)
    logs = (math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(fewer + 1))
    return min(1.0, 2 * math.fsum(math.exp(log - count * math.log(2)) for log in logs))


def _by_question(scores: Scores) -> np.ndarray:
    """[questions]: the mean over seeds."""
    values = np.asarray(scores, dtype=np.float64)
    if not values.size:
        raise ValueError("no scores")
    return values.mean(axis=0) if values.ndim == 2 else values


def _bounds(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resampled(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The means of the rows of `values` [rows, questions] in each resample of questions: [draws, rows].

    Questions with the same scores are interchangeable, so it is enough to draw how many of each kind there are. With
    too many kinds for that to pay, the questions themselves are drawn.
    """
    count = values.shape[1]
    kinds, sizes = np.unique(values, axis=1, return_counts=True)
    if 8 * len(sizes) <= count:
        return rng.multinomial(count, sizes / count, size=DRAWS) @ kinds.T / count
    means = np.empty((DRAWS, len(values)))
    some = max(1, AT_ONCE // count)
    for start in range(0, DRAWS, some):
        drawn = rng.integers(count, size=(min(some, DRAWS - start), count), dtype=np.int32)
        means[start : start + some] = np.stack([row.take(drawn).mean(axis=1) for row in values], axis=1)
    return means
