"""How many tokens an image costs, split by what may go to different places: tiles, tags, thumbnail.

The decoder architecture puts everything in its text stream; cross-attention puts the tags there and the tiles
in the cross-attended stream; the hybrid puts the thumbnail with its tag in the text stream and the regular
tiles with theirs in the cross-attended one. Which part goes where is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvlm.tiling.grid import TilePlan


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """Tokens of an image or of a part of it: `tiles` placeholders and `tags` text tokens."""

    tiles: int
    tags: int

    @property
    def total(self) -> int:
        """Placeholders and tags together."""
        return self.tiles + self.tags


def tokens_per_tile(tile_size: int = 448, patch_size: int = 14, downsample: int = 2) -> int:
    """Tokens of one tile after pixel shuffle: 256 for 448 px, 14 px patches and a factor of 2 per side."""
    for name, value in (("tile_size", tile_size), ("patch_size", patch_size), ("downsample", downsample)):
        if value <= 0:
            raise ValueError(f"{name}, got {value}, expected a positive number, fix: raise {name}")
    side, rest = divmod(tile_size, patch_size * downsample)
    if rest:
        raise ValueError(
            f"tile_size, got {tile_size}, expected a multiple of patch_size * downsample = "
            f"{patch_size} * {downsample} = {patch_size * downsample}, fix: change one of the three"
        )
    return side * side


def image_tokens(plan: TilePlan, per_tile: int, tag_lengths: Sequence[int]) -> ImageTokens:
    """Tokens of all tiles of one image; tag_lengths has the tokens of each tile's tag, thumbnail last."""
    _check_lengths(plan, tag_lengths)
    return _count(per_tile, tag_lengths)


def regular_tokens(plan: TilePlan, per_tile: int, tag_lengths: Sequence[int]) -> ImageTokens:
    """Tokens of the regular tiles alone; arguments as in image_tokens."""
    _check_lengths(plan, tag_lengths)
    return _count(per_tile, tag_lengths[:-1])


def thumbnail_tokens(plan: TilePlan, per_tile: int, tag_lengths: Sequence[int]) -> ImageTokens:
    """Tokens of the thumbnail alone; arguments as in image_tokens."""
    _check_lengths(plan, tag_lengths)
    return _count(per_tile, tag_lengths[-1:])


def _count(per_tile: int, tag_lengths: Sequence[int]) -> ImageTokens:
    return ImageTokens(tiles=per_tile * len(tag_lengths), tags=sum(tag_lengths))


def _check_lengths(plan: TilePlan, tag_lengths: Sequence[int]) -> None:
    if len(tag_lengths) != plan.num_tiles:
        raise ValueError(
            f"tag lengths, got {len(tag_lengths)}, expected {plan.num_tiles}, one per tile of a "
            f"{plan.cols}x{plan.rows} grid with its thumbnail, fix: pass a length for every tag of tile_tags"
        )
