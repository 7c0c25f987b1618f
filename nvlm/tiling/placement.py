"""The placement of an image's tiles and tags: the contract between architecture, loader and token budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nvlm.tiling.resample import Resampling

if TYPE_CHECKING:
    from nvlm.tiling.grid import TilePlan


@dataclass(frozen=True, slots=True)
class Words:
    """Text, as token ids: a tile's tag."""

    ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class TileTokens:
    """All tokens of one tile, in the encoder's order."""

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"tokens of a tile, got {self.length}, expected at least 1, fix: leave the tile out")


@dataclass(frozen=True, slots=True)
class TileMap:
    """The tokens of several tiles joined into one feature map, which is read row by row.

    `tiles` form a grid with `across` tiles per row; each tile has `rows` x `columns` tokens. `window` (top, left,
    bottom, right; tokens) is the part of the map that is kept, by default all of it; it may be resampled to fewer
    tokens, each a mixture of up to four. With `row_ends`, each row is followed by a position for a learned vector.
    """

    tiles: tuple[int, ...]
    across: int
    rows: int
    columns: int
    row_ends: bool = False
    window: tuple[int, int, int, int] | None = None
    resampled: Resampling | None = None

    def __post_init__(self) -> None:
        if self.across < 1 or not self.tiles or len(self.tiles) % self.across:
            raise ValueError(
                f"tiles of a map, got {len(self.tiles)}, expected whole rows of {self.across}, fix: the placement rule"
            )
        top, left, bottom, right = self.kept
        height, width = len(self.tiles) // self.across * self.rows, self.across * self.columns
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ValueError(
                f"window of a map, got {self.kept}, expected some of its {height} x {width} tokens, "
                f"fix: the placement rule"
            )

    @property
    def kept(self) -> tuple[int, int, int, int]:
        """`window`, or by default the whole map."""
        return self.window or (0, 0, len(self.tiles) // self.across * self.rows, self.across * self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tokens, without row ends."""
        top, left, bottom, right = self.kept
        return self.resampled.size if self.resampled else (bottom - top, right - left)

    @property
    def ends(self) -> int:
        """Number of row ends."""
        return self.shape[0] * self.row_ends

    @property
    def length(self) -> int:
        """Number of tokens, including row ends."""
        rows, columns = self.shape
        return rows * columns + self.ends


@dataclass(frozen=True, slots=True)
class RowEnd:
    """A position for the learned vector that ends the rows of maps, outside of a map: after a video's frame."""

    length: int = field(default=1, init=False)


Content = Words | TileTokens | TileMap | RowEnd


@dataclass(frozen=True, slots=True)
class Shown:
    """A part of a picture, after its tag, before an architecture decides where both go.

    `tile`: as in Piece. `overview`: the whole picture in one tile.
    """

    tile: int
    tag: tuple[int, ...]
    content: Content
    overview: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens within an image's placement.

    `tile`: the tile of the image that it names or shows; for a map, the first one. Visibility is defined by it: with
    `own_tile`, queries in this run see only the keys of their tile or map.
    """

    tile: int
    content: Content
    own_tile: bool = False

    @property
    def length(self) -> int:
        """Number of tokens in the run."""
        return self.content.length

    @property
    def tiles(self) -> tuple[int, ...]:
        """The tiles whose tokens it shows; none for words."""
        if isinstance(self.content, Words | RowEnd):
            return ()
        return self.content.tiles if isinstance(self.content, TileMap) else (self.tile,)

    @property
    def from_tiles(self) -> int:
        """Number of tile tokens that it is made of, without words and row ends."""
        if isinstance(self.content, Words | RowEnd):
            return 0
        if isinstance(self.content, TileMap):
            top, left, bottom, right = self.content.kept
            return (bottom - top) * (right - left)
        return self.content.length


@dataclass(frozen=True, slots=True)
class Placement:
    """What represents one image in the text stream and among the cross-attended keys.

    `tile_tokens`: number of tokens of each tile, thumbnail last. Raises ValueError if a piece disagrees.
    """

    tile_tokens: tuple[int, ...]
    stream: tuple[Piece, ...]
    cross: tuple[Piece, ...]

    def __post_init__(self) -> None:
        for piece in (*self.stream, *self.cross):
            shown = piece.content
            expected = shown.rows * shown.columns if isinstance(shown, TileMap) else shown.length
            for tile in piece.tiles:
                if expected != self.tile_tokens[tile]:
                    raise ValueError(
                        f"a piece of tile {tile}, got {expected} of its tokens, expected all "
                        f"{self.tile_tokens[tile]}, fix: the placement rule"
                    )
            if piece.tiles and piece.tile != piece.tiles[0]:
                raise ValueError(
                    f"a map's own tile, got {piece.tile}, expected its first, {piece.tiles[0]}, fix: the placement rule"
                )

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of tokens in the text stream and among the keys."""
        return sum(piece.length for piece in self.stream), sum(piece.length for piece in self.cross)

    @property
    def from_tiles(self) -> tuple[int, int]:
        """Number of tile tokens that the text stream and the keys are made of."""
        return sum(piece.from_tiles for piece in self.stream), sum(piece.from_tiles for piece in self.cross)


@dataclass(frozen=True, slots=True)
class TileUse:
    """Which tiles a pipeline stage or rank needs: those in the text stream, those among the keys."""

    stream: bool
    keys: bool

    def __bool__(self) -> bool:
        return self.stream or self.keys

    def __or__(self, other: TileUse) -> TileUse:
        return TileUse(self.stream or other.stream, self.keys or other.keys)


PlacementRule = Callable[["TilePlan", Sequence[tuple[int, ...]], Sequence[int]], Placement]
"""(plan, tag ids of each tile, tokens of each tile; thumbnail last) -> Placement; one per architecture."""
