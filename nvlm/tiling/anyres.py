"""Tilings whose tiles make one feature map: AnyRes (LLaVA-NeXT and -OneVision), and crops (LLaVA-NeXT-Ablations).

The image is enlarged or reduced with its aspect ratio kept, padded to a grid of tiles, and cut into them. What the
tokens show of the padding is cut off again, a learned vector may end each row, and a long map may be reduced. The whole
picture, as one more tile, comes first in the text stream (but stays last among the tiles). Integers in, integers out;
no pixels and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import RowEnd, Shown, TileMap, TileTokens
from nvlm.tiling.resample import LENIENT, capped

Grid = tuple[int, int]
"""Columns and rows of tiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """How the tiles of an image make a feature map: as in TilingConfig."""

    newline: bool
    cap: float | None
    unpad: str = "down"


@dataclass(frozen=True, slots=True)
class MapPlan(TilePlan):
    """The grid of an image of `size` (width, height) px, which covers `picture` (width, height) px in its centre.

    `regular`: whether tiles are cut from the image at all; without, it is shown by one tile alone.
    """

    size: tuple[int, int] = (0, 0)
    picture: tuple[int, int] = (0, 0)
    regular: bool = True
    joined: Joined = Joined(newline=True, cap=None)
    fill: tuple[int, int, int] | None = None

    @property
    def num_regular(self) -> int:
        """Number of tiles cut from the image, without the whole picture."""
        return self.cols * self.rows if self.regular else 0

    def shown(self, tags: Sequence[tuple[int, ...]], tokens: Sequence[int], apart: bool = False) -> tuple[Shown, ...]:
        """The whole picture, then the map of all tiles; with tags, or `apart`, each tile's part of the map alone."""
        last = self.num_regular
        whole = Shown(last, tags[last], TileTokens(tokens[last]), overview=True)
        if not last:  # a picture of one tile counts as one row (LLaVA's prepare_inputs_labels_for_multimodal)
            return (whole, Shown(0, (), RowEnd())) if self.joined.newline and not apart else (whole,)
        side = math.isqrt(tokens[0])
        window = unpadded(self.size, self.rows * side, self.cols * side, self.joined.unpad)
        if not _area(window):  # a picture that is thinner than half a token
            return (whole,)
        if not apart and not any(tags[:last]):
            return whole, Shown(0, (), self._map(tuple(range(last)), self.cols, side, window, self.joined))
        parts = {}
        for tile in range(last):
            row, column = divmod(tile, self.cols)
            part = _within(window, row * side, column * side, side)
            if share := _area(part) / _area(window):  # else the tile shows nothing but padding
                cap = None if self.joined.cap is None else self.joined.cap * share
                joined = replace(self.joined, cap=cap, newline=self.joined.newline and not apart)
                parts[tile] = self._map((tile,), 1, side, part, joined)
        return whole, *(Shown(tile, tags[tile], part) for tile, part in parts.items())

    def _map(
        self, tiles: tuple[int, ...], across: int, side: int, window: tuple[int, int, int, int], joined: Joined
    ) -> TileMap:
        top, left, bottom, right = window
        most = None if joined.cap is None else joined.cap * side * side
        resampled = None if most is None else capped(bottom - top, right - left, most)
        return TileMap(tiles, across, side, side, joined.newline, window, resampled)


def _area(window: tuple[int, int, int, int]) -> int:
    top, left, bottom, right = window
    return (bottom - top) * (right - left)


def _within(window: tuple[int, int, int, int], y: int, x: int, side: int) -> tuple[int, int, int, int]:
    """The part of `window` in the tile whose first token is at (y, x), in tokens of that tile."""
    top, left, bottom, right = window
    low, high = (max(0, min(side, value)) for value in (top - y, bottom - y))
    first, stop = (max(0, min(side, value)) for value in (left - x, right - x))
    return low, first, high, stop


def best_grid(width: int, height: int, grids: Sequence[Grid], tile_size: int) -> Grid:
    """The grid that shows most pixels of a `width` x `height` px image; of several, the one with least padding.

    LLaVA-NeXT's select_best_resolution: no image has more effective pixels than it has itself.
    """
    best, key = grids[0], (-1, 0)
    for cols, rows in grids:
        scale = min(cols * tile_size / width, rows * tile_size / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = cols * rows * tile_size * tile_size - effective
        if (effective, -wasted) > key:
            best, key = (cols, rows), (effective, -wasted)
    return best


def fitted(width: int, height: int, box: tuple[int, int]) -> tuple[int, int]:
    """An image's size (width, height) px when it fills `box` with its aspect ratio kept (resize_and_pad_image)."""
    across, down = box[0] / width, box[1] / height
    if across < down:
        return box[0], min(math.ceil(height * across), box[1])
    return min(math.ceil(width * down), box[0]), box[1]


def unpadded(size: tuple[int, int], rows: int, columns: int, rounding: str = "down") -> tuple[int, int, int, int]:
    """The window (top, left, bottom, right; tokens) of a `rows` x `columns` map that shows an image of `size` px.

    LLaVA-NeXT's unpad_image. `rounding`: down, or digits: to 7 digits first, as transformers does. With SigLIP's 27
    patches, 820 x 1107 px and its transpose differ.
    """
    width, height = size

    def whole(value: float) -> int:
        return int(value if rounding == "down" else round(value, 7))

    if width / height > columns / rows:
        spare = (rows - whole(height * (columns / width))) // 2
        return spare, 0, rows - spare, columns
    spare = (columns - whole(width * (rows / height))) // 2
    return 0, spare, rows, columns - spare


@dataclass(frozen=True, slots=True, kw_only=True)
class MapTiling:
    """A tiling by feature maps. `grids` to choose from: None for crops at the image's own resolution, () for none."""

    tile_size: int
    grids: tuple[Grid, ...] | None
    joined: Joined
    fill: tuple[int, int, int] | None

    def __call__(self, width: int, height: int, most: int) -> MapPlan:
        """The plan of a `width` x `height` px image with at most `most` tiles; with 1, it is shown by one tile alone.

        Raises ValueError unless every argument is positive.
        """
        if min(width, height, most) < 1:
            raise ValueError(
                f"image of {width} x {height} px in {most} tiles: expected positive numbers, fix: the file"
            )
        size, box = (width, height), self.tile_size
        common = dict(size=size, joined=self.joined, fill=self.fill)
        grids = None if self.grids is None else [grid for grid in self.grids if grid[0] * grid[1] <= most]
        if most == 1 or grids == []:
            return MapPlan(1, 1, box, picture=(box, box), regular=False, **common)
        if grids is not None:
            cols, rows = best_grid(width, height, grids, box)
            return MapPlan(cols, rows, box, picture=fitted(width, height, (cols * box, rows * box)), **common)
        cols, rows = math.ceil(width / box), math.ceil(height / box)
        picture = size
        if cols * rows > most:
            cols, rows, picture = _reduced(width, height, most, box)
        return MapPlan(cols, rows, box, picture=picture, **common)

    def full(self, most: int) -> tuple[MapPlan, ...]:
        """Plans for each grid of at most `most` tiles, among them those with most tokens: an image that fills it, and
        the largest ones whose map is not reduced yet."""
        common = dict(joined=self.joined, fill=self.fill)
        found = [self(1, 1, 1)]
        for cols, rows in self._grids(most):
            whole = (cols * self.tile_size, rows * self.tile_size)
            for size in (whole, *self._below_cap(*whole)):
                found.append(MapPlan(cols, rows, self.tile_size, size=size, picture=size, **common))
        return tuple(found)

    def counts(self, most: int) -> tuple[int, ...]:
        """The numbers of tiles that an image may have, of at most `most`; 0: the whole picture alone."""
        return (0, *sorted({cols * rows for cols, rows in self._grids(most)}))

    def of(self, tiles: int) -> MapPlan:
        """The plan of an image that fills a grid of `tiles` tiles, the squarest that there is; 0: of one tile alone."""
        if not tiles:
            return self(1, 1, 1)
        grids = [grid for grid in self._grids(tiles) if grid[0] * grid[1] == tiles] or [(tiles, 1)]
        cols, rows = min(grids, key=lambda grid: (abs(grid[0] - grid[1]), grid))
        size = (cols * self.tile_size, rows * self.tile_size)
        common = dict(joined=self.joined, fill=self.fill)
        return MapPlan(cols, rows, self.tile_size, size=size, picture=size, **common)

    def _grids(self, most: int) -> list[Grid]:
        every = [(cols, rows) for cols in range(1, most + 1) for rows in range(1, most // cols + 1)]
        return [grid for grid in (every if self.grids is None else self.grids) if grid[0] * grid[1] <= most]

    def _below_cap(self, width: int, height: int) -> list[tuple[int, int]]:
        """The largest sizes in px, of the whole width or the whole height, that are not reduced."""
        most = width * height if self.joined.cap is None else int(self.joined.cap * LENIENT**2 * self.tile_size**2)
        if most >= width * height:
            return []
        return [(width, most // width), (most // height, height)]


def _reduced(width: int, height: int, most: int, box: int) -> tuple[int, int, tuple[int, int]]:
    """The grid with most of the image's pixels, if it must be reduced to at most `most` tiles, and its size there."""
    grids = [(cols, rows) for cols in range(1, most + 1) for rows in range(1, most // cols + 1)]
    cols, rows = best_grid(width, height, grids, box)
    return cols, rows, fitted(width, height, (cols * box, rows * box))
