"""NVLM-H's placement rule: thumbnail in the text stream, regular tiles with their tags cross-attended (section 4.4)."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.arch.decoder.placement import with_tags
from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import Placement


def placement(plan: TilePlan, tags: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> Placement:
    """[thumbnail tag, thumbnail] in the stream; [tag 1, tile 1, ..., tag n, tile n] as keys.

    An image of one tile has no regular tiles: the tile is the thumbnail, and adds no keys.
    """
    return Placement(
        tuple(tokens),
        stream=with_tags(part for part in plan.shown(tags, tokens) if part.overview),
        # Each key is of one tile.
        cross=with_tags(part for part in plan.shown(tags, tokens, apart=True) if not part.overview),
    )
