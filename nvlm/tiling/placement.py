"""Where one image's tiles and tags go: the contract between an architecture, the loader and the token budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvlm.tiling.grid import TilePlan


@dataclass(frozen=True, slots=True)
class Words:
    """Text, as token ids: a tile's tag."""

    ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class TileTokens:
    """All tokens of one tile, in the order in which the encoder gives them."""

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"tokens of a tile, got {self.length}, expected at least 1, fix: leave the tile out")


@dataclass(frozen=True, slots=True)
class Piece:
    """A run inside an image's block.

    `tile`: the tile of the image that it names or shows. `own_tile`: a query of this run sees its own tile alone.
    """

    tile: int
    content: Words | TileTokens
    own_tile: bool = False

    @property
    def length(self) -> int:
        """Tokens of the run."""
        return self.content.length

    @property
    def from_tiles(self) -> int:
        """How many of them are tokens of tiles; the others are words."""
        return 0 if isinstance(self.content, Words) else self.length


@dataclass(frozen=True, slots=True)
class Placement:
    """What stands for one image: in the text stream, and among the cross-attended keys.

    `tile_tokens`: how many tokens each tile has, thumbnail last. Raises ValueError where a piece disagrees.
    """

    tile_tokens: tuple[int, ...]
    stream: tuple[Piece, ...]
    cross: tuple[Piece, ...]

    def __post_init__(self) -> None:
        for piece in (*self.stream, *self.cross):
            if isinstance(piece.content, TileTokens) and piece.length != self.tile_tokens[piece.tile]:
                raise ValueError(
                    f"a piece of tile {piece.tile}, got {piece.length} tokens, expected the tile's "
                    f"{self.tile_tokens[piece.tile]}, fix: the placement rule"
                )

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens in the text stream, and cross-attended ones."""
        return sum(piece.length for piece in self.stream), sum(piece.length for piece in self.cross)

    @property
    def from_tiles(self) -> tuple[int, int]:
        """Those of them that are tokens of tiles."""
        return sum(piece.from_tiles for piece in self.stream), sum(piece.from_tiles for piece in self.cross)


@dataclass(frozen=True, slots=True)
class TileUse:
    """Which tiles a pipeline stage, or a rank, needs: those of the text stream, those of the keys."""

    stream: bool
    keys: bool

    def __bool__(self) -> bool:
        return self.stream or self.keys

    def __or__(self, other: TileUse) -> TileUse:
        return TileUse(self.stream or other.stream, self.keys or other.keys)


PlacementRule = Callable[[TilePlan, Sequence[tuple[int, ...]], Sequence[int]], Placement]
"""(plan, tag ids of each tile, tokens of each tile; thumbnail last) -> Placement; one per architecture."""
