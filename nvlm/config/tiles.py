"""The rules by which a run's images and videos become tiles. Imports no torch."""

from __future__ import annotations

from nvlm.config.values import TilingConfig, VisionConfig
from nvlm.config.video import VideoConfig
from nvlm.tiling.anyres import Joined, MapTiling
from nvlm.tiling.frames import FrameTiling
from nvlm.tiling.grid import DynamicTiling

Tiling = DynamicTiling | MapTiling


def tiling_of(tiling: TilingConfig, vision: VisionConfig) -> Tiling:
    """The rule that `tiling.kind` names, for the encoder's tiles."""
    if tiling.kind == "dhr":
        return DynamicTiling(vision.tile_size)
    return MapTiling(
        tile_size=vision.tile_size,
        grids=None if tiling.kind == "crops" else tuple(grid_of(one) for one in tiling.pinpoints),
        joined=Joined(newline=tiling.newline, cap=tiling.cap, unpad=tiling.unpad),
        fill=tiling.fill if tiling.base == "pad" else None,
    )


def frames_of(video: VideoConfig, tiling: TilingConfig, vision: VisionConfig) -> FrameTiling:
    """The rule by which a run's videos become tiles."""
    return FrameTiling(
        tile_size=vision.tile_size,
        fit=video.fit,
        fill=tiling.fill,
        pool=video.pool,
        before=video.before_projector,
        separator=video.separator,
        slow_every=video.slow_every,
    )


def grid_of(pinpoint: str) -> tuple[int, int]:
    """Columns and rows of COLUMNSxROWS."""
    cols, _, rows = pinpoint.partition("x")
    return int(cols), int(rows)
