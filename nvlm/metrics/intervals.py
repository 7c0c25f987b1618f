"""How certain a mean is: bootstrap intervals, and paired differences between two runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over `count` questions, and the bounds of its percentile bootstrap interval (Efron 1979)."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap(scores: Sequence[float], seed: int = 0) -> Interval:
    """The mean of `scores` with its 95% interval, from 10,000 resamples of questions. Raises ValueError without any."""
    if not len(scores):
        raise ValueError("no scores")
    values, rng = np.asarray(scores, dtype=np.float64), np.random.default_rng(seed)
    means = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(DRAWS)])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high), count=len(values))
