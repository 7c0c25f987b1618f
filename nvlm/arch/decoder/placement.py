"""NVLM-D's placement rule: each tile after its tag in the text stream, thumbnail last (NVLM section 4.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import Piece, Placement, Shown, Words


def placement(plan: TilePlan, tags: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> Placement:
    """[tag 1, tile 1, ..., thumbnail tag, thumbnail] in the stream; nothing is cross-attended.

    Other tilings have their own order: AnyRes puts the whole picture first.
    """
    return Placement(tuple(tokens), stream=with_tags(plan.shown(tags, tokens)), cross=())


def with_tags(parts: Iterable[Shown]) -> tuple[Piece, ...]:
    """Each of `parts`, after its tag."""
    return tuple(piece for s in parts for piece in (Piece(s.tile, Words(s.tag)), Piece(s.tile, s.content)))
