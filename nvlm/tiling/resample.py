"""Which tokens of a feature map are mixed into the tokens of a smaller one, with which weights. Imports no torch.

The filters are torch's: `bilinear` is interpolate(mode="bilinear") without antialiasing; `average` and `max` are
pooling by 2 x 2, which leaves out an odd last row or column. Each takes at most two tokens along each side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FILTERS = ("bilinear", "average", "max")
LENIENT = 1.1  # a map may be longer per side by this factor before it is reduced


@dataclass(frozen=True, slots=True)
class Resampling:
    """A map of `size` (rows, columns), made by the filter `kind` from a larger one."""

    size: tuple[int, int]
    kind: str = "bilinear"


def halved(rows: int, columns: int, kind: str) -> Resampling:
    """Half of a map's tokens per side: of 27, bilinear makes 14 (LLaVA-OneVision), average and max make 13."""
    up = kind == "bilinear"
    return Resampling((max(1, (rows + up) // 2), max(1, (columns + up) // 2)), kind)


def capped(rows: int, columns: int, most: float) -> Resampling | None:
    """What reduces a map to about `most` tokens; None if it has at most 1.1 x 1.1 as many (LLaVA-OneVision's
    anyres_max_9, whose published code has this factor)."""
    times = math.sqrt(rows * columns / most)
    return Resampling((max(1, int(rows // times)), max(1, int(columns // times)))) if times > LENIENT else None


def taps(count: int, size: int, kind: str) -> list[tuple[tuple[int, int], tuple[float, float]]]:
    """Along one side, the two of `count` tokens that each of `size` new ones is made of, and their weights."""
    if kind != "bilinear":
        return [((2 * i, min(2 * i + 1, count - 1)), (0.5, 0.5)) for i in range(size)]
    scale, found = count / size, []
    for i in range(size):
        at = max(scale * (i + 0.5) - 0.5, 0.0)
        first = min(int(at), count - 1)
        second = min(first + 1, count - 1)
        found.append(((first, second), (1 - (at - first), at - first)))
    return found
