"""NVLM-D's placement rule: each tile behind its tag in the text stream, thumbnail last (NVLM section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import Piece, Placement


def placement(plan: TilePlan, tags: Sequence[tuple[int, ...]]) -> Placement:
    """[tag 1, tile 1, ..., thumbnail tag, thumbnail] in the stream; nothing is cross-attended."""
    return Placement(stream=with_tags(range(plan.num_tiles), tags), cross=())


def with_tags(tiles: Sequence[int], tags: Sequence[tuple[int, ...]]) -> tuple[Piece, ...]:
    """Each of `tiles` behind its tag."""
    return tuple(piece for t in tiles for piece in (Piece(t, tags[t]), Piece(t)))
