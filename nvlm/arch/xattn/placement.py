"""NVLM-X's placement rule: only tags in the text stream, all tiles cross-attended (NVLM section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import Piece, Placement, TileTokens, Words


def placement(plan: TilePlan, tags: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> Placement:
    """Tags 1..n and the thumbnail's in the stream, each seeing only its tile; tiles and thumbnail as keys."""
    tiles = range(plan.num_tiles)
    return Placement(
        tuple(tokens),
        stream=tuple(Piece(t, Words(tags[t]), own_tile=True) for t in tiles),
        cross=tuple(Piece(t, TileTokens(tokens[t])) for t in tiles),
    )
