"""A record's images and videos for people to look at, and to see whether they can be decoded. Imports no torch."""

from __future__ import annotations

from typing import Any

from PIL import Image

from nvlm.config.video import VideoConfig
from nvlm.data.images import decode_image
from nvlm.data.plans import Size
from nvlm.data.record import Record
from nvlm.data.video.clip import Video
from nvlm.data.video.decode import decode, first_frame


def still(picture: Any, max_pixels: int, video: VideoConfig) -> Image.Image:
    """The image, or the first frame of the video. Raises BadRecord."""
    if isinstance(picture, Video):
        return Image.fromarray(first_frame(picture, max_pixels, video.max_seconds))
    return decode_image(picture, max_pixels)


def check_pixels(picture: Any, size: Size, max_pixels: int, video: VideoConfig) -> None:
    """Raise BadRecord if the image, or the used frames of the video, cannot be decoded. `size`: from its header."""
    if isinstance(picture, Video):
        decode(picture, max_pixels, video, planned=size[2])
    else:
        decode_image(picture, max_pixels, size)


def has_videos(record: Record) -> bool:
    """Whether some of its pictures are videos."""
    return any(isinstance(picture, Video) for picture in record.images)
