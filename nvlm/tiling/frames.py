"""Videos: each frame is one tile, whose tokens may be pooled, with learned vectors between frames. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nvlm.tiling.grid import TilePlan, pooled_side
from nvlm.tiling.placement import RowEnd, Shown, TileMap, TileTokens
from nvlm.tiling.resample import Resampling, halved


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameTiling:
    """How a frame becomes a tile of `tile_size` px, and its tokens: as in VideoConfig. `fill`: RGB beside a frame that
    is padded."""

    tile_size: int
    fit: str = "stretch"
    fill: tuple[int, int, int] = (0, 0, 0)
    pool: str = "none"
    before: bool = False
    separator: str = "none"
    slow_every: int = 0

    def of(self, frames: int) -> FramePlan:
        """The plan of a video of which `frames` frames are used."""
        return FramePlan(1, 1, self.tile_size, frames, self)

    def pooled(self, frame: int, side: int) -> Resampling | None:
        """What the `side` x `side` tokens of a frame become; None: they stay as they are."""
        if self.pool == "none" or self.before:
            return None
        if self.slow_every and frame % self.slow_every:
            return Resampling((math.ceil(side / 4), math.ceil(side / 4)), self.pool)
        return halved(side, side, self.pool)

    def tokens(self, frame: int, each: int) -> int:
        """The tokens of a frame's tile, where a tile of the encoder has `each`."""
        if self.pool == "none" or not self.before:
            return each
        factor = 4 if self.slow_every and frame % self.slow_every else 2
        return pooled_side(math.isqrt(each), factor, self.pool) ** 2


@dataclass(frozen=True, slots=True)
class FramePlan(TilePlan):
    """The tiles of a video: its used frames, in order."""

    frames: int = 1
    rule: FrameTiling = FrameTiling(tile_size=448)

    @property
    def num_regular(self) -> int:
        """No tile is cut from a frame."""
        return 0

    @property
    def num_tiles(self) -> int:
        """Number of frames."""
        return self.frames

    @property
    def tagged(self) -> bool:
        """Frames have no tags."""
        return False

    def tokens(self, each: int) -> list[int]:
        """The tokens of each frame's tile, where a tile of the encoder has `each`."""
        return [self.rule.tokens(frame, each) for frame in range(self.frames)]

    def shown(self, tags: Sequence[tuple[int, ...]], tokens: Sequence[int], apart: bool = False) -> tuple[Shown, ...]:
        """Frame after frame, as whole pictures without tags, and, unless they stand `apart`, the learned vectors that
        separate them."""
        return tuple(self._parts(tokens, "none" if apart else self.rule.separator))

    def _parts(self, tokens: Sequence[int], separator: str) -> Iterator[Shown]:
        for frame, count in enumerate(tokens):
            side, rows = math.isqrt(count), separator == "row"
            pooled = self.rule.pooled(frame, side)
            whole = pooled is None and not rows
            shown = TileTokens(count) if whole else TileMap((frame,), 1, side, side, rows, resampled=pooled)
            yield Shown(frame, (), shown, overview=True)
            if separator == "frame" or separator == "once" and frame == self.frames - 1:
                yield Shown(frame, (), RowEnd(), overview=True)
