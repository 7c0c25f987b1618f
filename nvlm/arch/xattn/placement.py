"""NVLM-X's placement rule: tags alone in the text stream, all tiles cross-attended (NVLM section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import Piece, Placement


def placement(plan: TilePlan, tags: Sequence[tuple[int, ...]]) -> Placement:
    """Tags 1..n and the thumbnail's in the stream, each seeing its own tile; tiles and thumbnail as keys."""
    tiles = range(plan.num_tiles)
    return Placement(
        stream=tuple(Piece(t, tags[t], own_tile=True) for t in tiles),
        cross=tuple(Piece(t) for t in tiles),
    )
