"""Rules about how videos are shown. Imports no torch."""

from __future__ import annotations

import math

from nvlm.config.values import Config, problem


def check_video(config: Config) -> None:
    """Raise ConfigError if frames cannot be pooled as configured."""
    video, side = config.video, math.isqrt(config.vision.tile_tokens)
    if video.slow_every and video.pool != "bilinear":
        expected = "0, or video.pool=bilinear, which reduces fast frames to a quarter per side"
        raise problem("video.slow_every", video.slow_every, expected, "video.pool=bilinear, or video.slow_every=0")
    if video.before_projector and video.pool == "none":
        expected = "false with video.pool=none, which leaves frames as they are"
        raise problem("video.before_projector", True, expected, "video.pool=average, or video.before_projector=false")
    least = 4 if video.slow_every else 2
    if video.pool != "none" and side < least:
        got = f"{video.pool} of frames of {side} x {side} tokens"
        raise problem("video.pool", got, f"at least {least} x {least} tokens a frame", "video.pool=none")
