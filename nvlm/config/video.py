"""How videos become frames, and frames become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from nvlm.config.fields import Choice, Natural, Positive, Range

VIDEO_MARK = "<video>"  # marks the place of a video in a message of a record with videos


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoConfig:
    """At most `frames` frames of a video, each a tile; with `rate` so many per second, if these are not more.

    `fit`: how a frame becomes a square tile. `pool`: a frame's tokens are reduced to half of them per side, after the
    projector as in LLaVA-NeXT's own code or, with `before_projector`, before it as in transformers' LLaVA-NeXT-Video.
    `separator`: a learned vector after each row of a frame, each frame, or the video. `slow_every`: with n, only every
    n-th frame, from the first on, is reduced so; the others to a quarter per side. `max_seconds`: a longer video is
    refused.
    """

    frames: Annotated[int, Range(1, 4096)] = 8
    rate: Positive | None = None
    fit: Annotated[str, Choice("stretch", "pad", "crop")] = "stretch"
    pool: Annotated[str, Choice("none", "average", "max", "bilinear")] = "none"
    before_projector: bool = False
    separator: Annotated[str, Choice("none", "once", "frame", "row")] = "none"
    slow_every: Natural = 0
    max_seconds: Positive = 7200.0
