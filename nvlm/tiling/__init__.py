"""Dynamic high-resolution tiling: an image's grid, its tags, its pixels and its token counts.

grid and tags are plain Python, so that a configuration can be checked without loading torch. Names that need torch
are in pixels and loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nvlm.tiling.grid import TilePlan, choose_grid, fit_max_tiles, plan_tiles, ratios, tokens_per_tile
from nvlm.tiling.tags import TAG_STYLES, tile_tags

if TYPE_CHECKING:
    from nvlm.tiling.pixels import normalize, tile_image

__all__ = [
    "TAG_STYLES",
    "TilePlan",
    "choose_grid",
    "fit_max_tiles",
    "normalize",
    "plan_tiles",
    "ratios",
    "tile_image",
    "tile_tags",
    "tokens_per_tile",
]

_NEEDS_TORCH = ("normalize", "tile_image")


def __getattr__(name: str) -> Any:
    """Load a name that needs torch from pixels on first access (PEP 562)."""
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nvlm.tiling import pixels

    return getattr(pixels, name)
