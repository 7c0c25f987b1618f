"""NVLM-X's placement rule: only tags in the text stream, all tiles cross-attended (NVLM section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import Piece, Placement, Words


def placement(plan: TilePlan, tags: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> Placement:
    """Tags 1..n and the thumbnail's in the stream, each seeing only its tile; tiles and thumbnail as keys."""
    parts = plan.shown(tags, tokens, apart=True)  # each key is of one tile
    return Placement(
        tuple(tokens),
        stream=tuple(Piece(part.tile, Words(part.tag), own_tile=True) for part in parts),
        cross=tuple(Piece(part.tile, part.content) for part in parts),
    )
