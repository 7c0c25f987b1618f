"""NVLM-D's placement rule: each tile after its tag in the text stream, thumbnail last (NVLM section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import Piece, Placement, TileTokens, Words


def placement(plan: TilePlan, tags: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> Placement:
    """[tag 1, tile 1, ..., thumbnail tag, thumbnail] in the stream; nothing is cross-attended."""
    return Placement(tuple(tokens), stream=with_tags(range(plan.num_tiles), tags, tokens), cross=())


def with_tags(tiles: Sequence[int], tags: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> tuple[Piece, ...]:
    """Each of `tiles`, after its tag."""
    return tuple(piece for t in tiles for piece in (Piece(t, Words(tags[t])), Piece(t, TileTokens(tokens[t]))))
