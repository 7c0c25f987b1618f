"""The metrics by name. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nvlm.metrics.exact import exact_match
from nvlm.metrics.line import Line

Metric = Callable[[Sequence[Line]], list[float]]
"""The score of each line. A metric that needs all lines at once, such as CIDEr-D, is given all of them."""


def each(score: Callable[[Line], float]) -> Metric:
    """The metric that scores each line by itself."""
    return lambda lines: [score(line) for line in lines]


METRICS: dict[str, Metric] = {"exact_match": each(exact_match)}
