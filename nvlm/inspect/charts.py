"""Histograms, quantiles and shares as plain numbers, which the page draws."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

_MOST = 32  # bars
_STEPS = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class Bar:
    """The values from `low` to `high`, both included, of which there are `count`."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """Bars of equal width without gaps, and the quantiles of the values."""

    title: str
    unit: str
    bars: tuple[Bar, ...]
    quantiles: dict[str, int]

    @property
    def highest(self) -> int:
        """The count of the highest bar."""
        return max(bar.count for bar in self.bars)


def histogram(title: str, unit: str, values: Counter) -> Histogram:
    """At most _MOST bars of `values`, a count by whole number, which must not be empty."""
    low, high = min(values), max(values)
    step = _step(high - low + 1)
    first = low // step
    counts = [0] * (high // step - first + 1)
    for value, count in values.items():
        counts[value // step - first] += count
    starts = (step * (first + number) for number in range(len(counts)))
    bars = tuple(Bar(start, start + step - 1, count) for start, count in zip(starts, counts))
    return Histogram(title, unit, bars, quantiles(values))


def _step(width: int) -> int:
    """The least of 1, 2, 5, 10, ... by which `width` values make at most _MOST - 1 bars, and one for the alignment."""
    least = max(1, width / (_MOST - 1))
    power = 10 ** math.floor(math.log10(least))
    return next(factor * power for factor in (*_STEPS, 10) if factor * power >= least)


def quantiles(values: Counter) -> dict[str, int]:
    """The least value, the median, the 90th and 99th percentiles and the greatest; none if there are no values."""
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: quantile(values, share) for name, share in shares.items()} if values else {}


def quantile(values: Counter, share: float) -> int:
    """The least value such that at least `share` of all are not above it."""
    needed, seen = share * values.total(), 0
    for value in sorted(values):
        seen += values[value]
        if seen >= needed:
            return value
    raise ValueError("quantile of no values")
