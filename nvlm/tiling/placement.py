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
class TileMap:
    """Tokens of several tiles put together as one picture, and read row by row.

    The `tiles` of the image stand in a grid, `across` side by side, and each brings `rows` x `columns` tokens. Of the
    map that they make, `window` (top, left, bottom, right; tokens) is kept, by default all of it. With `row_ends` one
    more place, for a learned vector, stands behind each row.
    """

    tiles: tuple[int, ...]
    across: int
    rows: int
    columns: int
    row_ends: bool = False
    window: tuple[int, int, int, int] | None = None

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
        """`window`, also where it is the whole map."""
        return self.window or (0, 0, len(self.tiles) // self.across * self.rows, self.across * self.columns)

    @property
    def length(self) -> int:
        """Tokens, with the places at the rows' ends."""
        top, left, bottom, right = self.kept
        return (bottom - top) * (right - left + self.row_ends)

    def sources(self) -> list[tuple[int, int] | None]:
        """Which (tile, token of it) stands in each place; None at a row's end."""
        top, left, bottom, right = self.kept
        found: list[tuple[int, int] | None] = []
        for y in range(top, bottom):
            for x in range(left, right):
                tile = self.tiles[y // self.rows * self.across + x // self.columns]
                found.append((tile, y % self.rows * self.columns + x % self.columns))
            found += [None] * self.row_ends
        return found


@dataclass(frozen=True, slots=True)
class Piece:
    """A run inside an image's block.

    `tile`: the tile of the image that it names or shows, of a map the first. Who sees whom goes by it: `own_tile` says
    that a query of this run sees the keys of its own tile, or map, alone.
    """

    tile: int
    content: Words | TileTokens | TileMap
    own_tile: bool = False

    @property
    def length(self) -> int:
        """Tokens of the run."""
        return self.content.length

    @property
    def tiles(self) -> tuple[int, ...]:
        """The tiles whose tokens it shows: none where it is words."""
        if isinstance(self.content, Words):
            return ()
        return self.content.tiles if isinstance(self.content, TileMap) else (self.tile,)

    @property
    def from_tiles(self) -> int:
        """How many of its tokens are tokens of tiles, neither words nor ends of rows."""
        return sum(source is not None for source in self.sources())

    def sources(self) -> list[tuple[int, int] | None]:
        """Which (tile, token of it) fills each place that words do not; None at the end of a map's row."""
        if isinstance(self.content, TileMap):
            return self.content.sources()
        return [(tile, token) for tile in self.tiles for token in range(self.length)]


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
