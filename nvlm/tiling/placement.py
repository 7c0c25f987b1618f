"""Where one image's tiles and tags go: the contract between an architecture, the loader and the token budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvlm.tiling.grid import TilePlan


@dataclass(frozen=True, slots=True)
class Piece:
    """A run inside an image's block: the text of a tile's tag (`ids`), or the tile's own K tokens (`ids` None).

    `own_tile`: a query of this run sees its own tile alone.
    """

    tile: int
    ids: tuple[int, ...] | None = None
    own_tile: bool = False

    def length(self, tile_tokens: int) -> int:
        """Tokens of the run."""
        return tile_tokens if self.ids is None else len(self.ids)


@dataclass(frozen=True, slots=True)
class Placement:
    """Into the text stream, and into the cross-attended keys."""

    stream: tuple[Piece, ...]
    cross: tuple[Piece, ...]

    def tokens(self, tile_tokens: int) -> tuple[int, int]:
        """Tokens in the text stream, and cross-attended ones."""
        stream, cross = (sum(p.length(tile_tokens) for p in pieces) for pieces in (self.stream, self.cross))
        return stream, cross


@dataclass(frozen=True, slots=True)
class TileUse:
    """Which tiles a pipeline stage, or a rank, needs: those of the text stream, those of the keys."""

    stream: bool
    keys: bool

    def __bool__(self) -> bool:
        return self.stream or self.keys

    def __or__(self, other: TileUse) -> TileUse:
        return TileUse(self.stream or other.stream, self.keys or other.keys)


PlacementRule = Callable[[TilePlan, Sequence[tuple[int, ...]]], Placement]
"""(plan, tag ids of each tile, thumbnail last) -> Placement; one per architecture."""
