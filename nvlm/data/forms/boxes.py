"""Boxes as text, in the form of NVLM's paper (appendix E). Imports no torch.

A box is <box>(x1,y1),(x2,y2)</box>, its top-left and bottom-right corners; one of four corners is <quad> with four
pairs. Coordinates are integers from 0, the left or top edge of the image, to 999, the right or bottom edge, rounded to
the nearest: the scale of the 2-D box tags of tiles (nvlm.tiling.tags).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

from nvlm.data.parts import shown
from nvlm.data.record import BadRecord

_MAX = 999


def box_text(box: Any, size: tuple[int, int], what: str) -> str:
    """`box` as text: two or four corners, as pairs or in one list, px from the top left of an image of `size` (width,
    height). `what` it is, for messages. Raises BadRecord if it is empty or not wholly inside the image."""
    corners = _corners(box, what)
    shown = ",".join(f"({x:g},{y:g})" for x, y in corners)
    if not all(0 <= x <= size[0] and 0 <= y <= size[1] for x, y in corners):
        raise BadRecord(f"{what}, {shown}, is not inside the image of {size[0]} x {size[1]} px")
    if _area(corners) <= 0:
        raise BadRecord(f"{what}, {shown}, is empty: expected x1 < x2 and y1 < y2")
    tag = "box" if len(corners) == 2 else "quad"
    scaled = (tuple(math.floor(_MAX * value / length + 0.5) for value, length in zip(c, size)) for c in corners)
    return f"<{tag}>{','.join(f'({x},{y})' for x, y in scaled)}</{tag}>"


def _corners(box: Any, what: str) -> list[tuple[float, float]]:
    values = box if isinstance(box, Sequence) and not isinstance(box, str | bytes) else ()
    if values and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in values):
        values = list(chain.from_iterable(values))
    if len(values) not in (4, 8) or not all(map(_is_number, values)):
        raise BadRecord(f"{what} is {shown(box)}, expected 4 numbers (two corners) or 8 (four corners)")
    return list(zip(values[::2], values[1::2]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _area(corners: Sequence[tuple[float, float]]) -> float:
    """The area in px, negative if the two corners of a box are swapped; a quadrilateral may go either way around."""
    if len(corners) == 2:
        (x1, y1), (x2, y2) = corners
        return (x2 - x1) * (y2 - y1) if x2 > x1 else 0
    pairs = zip(corners, (*corners[1:], corners[0]))
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs)) / 2
