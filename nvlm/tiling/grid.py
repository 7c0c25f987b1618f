"""Chooses an image's tile grid from its size: integers in, integers out, no pixels and no torch.

A grid is (cols, rows). An image's tiles are its regular tiles in row-major order, then a thumbnail of the whole
image; an image with a 1x1 grid has only the thumbnail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from nvlm.tiling.placement import Shown, TileTokens

# If the images of a sample do not fit, the limit on tiles per image is lowered to these values in turn.
_LADDER = (12, 8, 6, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class TilePlan:
    """The grid of one image: cols x rows tiles, each tile_size x tile_size px."""

    cols: int
    rows: int
    tile_size: int = 448

    @property
    def num_regular(self) -> int:
        """Number of tiles cut from the image, without the thumbnail; 0 for a 1x1 grid."""
        return 0 if self.cols == self.rows == 1 else self.cols * self.rows

    @property
    def num_tiles(self) -> int:
        """Number of all tiles, including the thumbnail, which is the last one."""
        return self.num_regular + 1

    @property
    def width(self) -> int:
        """Width in px of the grid."""
        return self.cols * self.tile_size

    @property
    def height(self) -> int:
        """Height in px of the grid."""
        return self.rows * self.tile_size

    @property
    def picture(self) -> tuple[int, int]:
        """Size (width, height) in px of the resized image, in the centre of the grid."""
        return self.width, self.height

    @property
    def fill(self) -> tuple[int, int, int] | None:
        """RGB with which the whole picture is padded to a square before it becomes one tile; None: it is stretched."""
        return None

    @property
    def tagged(self) -> bool:
        """Whether tiles may have tags."""
        return True

    def boxes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Crop boxes (left, top, right, bottom) of the regular tiles in px of the resized image, row-major."""
        size = self.tile_size
        corners = (((k % self.cols) * size, (k // self.cols) * size) for k in range(self.num_regular))
        return tuple((x, y, x + size, y + size) for x, y in corners)

    def tokens(self, each: int) -> list[int]:
        """The tokens of each tile, where a tile of the encoder has `each`."""
        return [each] * self.num_tiles

    def shown(self, tags: Sequence[tuple[int, ...]], tokens: Sequence[int], apart: bool = False) -> tuple[Shown, ...]:
        """What an image shows, in order: each tile after its tag. `tags`, `tokens`: of each tile, thumbnail last;
        `apart`: no part shows several tiles, and none ends rows."""
        last = self.num_regular
        return tuple(Shown(t, tags[t], TileTokens(tokens[t]), overview=t == last) for t in range(self.num_tiles))


@cache
def ratios(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All grids (cols, rows) of at most max_tiles tiles, fewest tiles first (NVLM section 4.1)."""
    _require_positive(max_tiles=max_tiles)
    grids = ((i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles // i + 1))
    # choose_grid depends only on the order by tile count: up to 64 tiles, no two grids with the same count are
    # adjacent in aspect ratio, so they never tie for the best. Sorting by cols just makes the order definite.
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


def choose_grid(width: int, height: int, max_tiles: int = 6, tile_size: int = 448) -> tuple[int, int]:
    """Grid (cols, rows) closest in aspect ratio to a width x height px image (NVLM section 4.1).

    On an exact tie, the grid with more tiles wins if the image has more than half as many pixels as it.
    Raises ValueError unless every argument is positive.
    """
    _require_positive(width=width, height=height, max_tiles=max_tiles, tile_size=tile_size)
    aspect = width / height
    best, best_gap = (1, 1), float("inf")
    # Floats are compared for ties, as in the published code: exact fractions would choose other grids.
    for cols, rows in ratios(max_tiles):
        gap = abs(aspect - cols / rows)
        tie_won = gap == best_gap and width * height > 0.5 * tile_size * tile_size * cols * rows
        if gap < best_gap or tie_won:
            best, best_gap = (cols, rows), gap
    return best


def plan_tiles(width: int, height: int, max_tiles: int = 6, tile_size: int = 448) -> TilePlan:
    """Tile plan of a width x height px image. Raises ValueError unless every argument is positive."""
    return TilePlan(*choose_grid(width, height, max_tiles, tile_size), tile_size)


PlanRule = Callable[[int, int, int], TilePlan]
"""(width, height, limit on tiles) -> the plan of an image of that size in px"""


@dataclass(frozen=True, slots=True)
class DynamicTiling:
    """NVLM's dynamic high resolution, with tiles of `tile_size` px."""

    tile_size: int

    def __call__(self, width: int, height: int, most: int) -> TilePlan:
        """The plan of a `width` x `height` px image with at most `most` tiles."""
        return plan_tiles(width, height, most, self.tile_size)

    def full(self, most: int) -> tuple[TilePlan, ...]:
        """The plan of every grid of at most `most` tiles."""
        return tuple(TilePlan(cols, rows, self.tile_size) for cols, rows in ratios(most))

    def counts(self, most: int) -> tuple[int, ...]:
        """The numbers of tiles that an image may have, of at most `most`."""
        return tuple(range(1, most + 1))

    def of(self, tiles: int) -> TilePlan:
        """A plan with `tiles` tiles."""
        return TilePlan(tiles, 1, self.tile_size)


def fit_max_tiles(
    sizes: Sequence[tuple[int, ...]],
    room: int,
    tokens_of: Callable[[TilePlan], int],
    max_tiles: int = 6,
    plan: Callable[..., TilePlan] = plan_tiles,
) -> tuple[TilePlan, ...]:
    """Plans for the images of one sample, with at most `room` tokens in total.

    `sizes`: (width, height) in px; `tokens_of`: the number of tokens of a plan. All images of the sample have the same
    limit on tiles: max_tiles, then the values of 12, 8, 6, 4, 2, 1 below it, until the images fit. Raises ValueError
    with both counts if they do not fit even with one tile each.
    """
    _require_positive(max_tiles=max_tiles)
    needed = 0
    for limit in (max_tiles, *(step for step in _LADDER if step < max_tiles)):
        plans = tuple(plan(*size, limit) for size in sizes)
        needed = sum(tokens_of(plan) for plan in plans)
        if needed <= room:
            return plans
    raise ValueError(
        f"image tokens, got {len(sizes)} images that need {needed} tokens with one tile each, "
        f"expected at most {room} available, fix: raise the sequence length, or drop images or text"
    )


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}, got {value}, expected a positive number, fix: raise {name}")


POOLS = ("concat", "average", "max", "bilinear")
"""Ways to make one token of a block of patches."""


def pooled_side(side: int, factor: int, pool: str = "concat", pads: bool = False) -> int:
    """Tokens per side of a grid of `side` x `side` patches of which blocks of `factor` x `factor` become one token.

    Patches at the right and at the bottom that fill no block are dropped by average and max, as torch's pooling does;
    bilinear rounds up, as LLaVA-NeXT's does; concat refuses them, or with `pads` adds zeros, as VILA does.
    """
    _require_positive(side=side, factor=factor)
    if factor > side:
        raise ValueError(
            f"pooling, got blocks of {factor} x {factor}, expected at most {side} patches, fix: a smaller one"
        )
    if pool == "concat" and side % factor and not pads:
        raise ValueError(f"pooling, got {side} patches per side, expected a multiple of {factor}, fix: pad with zeros")
    return -(-side // factor) if pool in ("concat", "bilinear") else side // factor


def tokens_per_tile(
    tile_size: int = 448, patch_size: int = 14, downsample: int = 2, pool: str = "concat", pads: bool = False
) -> int:
    """Tokens of one tile after pooling: 256 for 448 px, 14 px patches and blocks of 2 x 2. Sizes in px.

    Pixels at the right and at the bottom that fill no patch do not count.
    """
    _require_positive(tile_size=tile_size, patch_size=patch_size, downsample=downsample)
    return pooled_side(tile_size // patch_size, downsample, pool, pads) ** 2
