"""The images of a row, as users write them: a path, the file's bytes, or a struct of both. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from nvlm.data.images import image_path
from nvlm.data.parts import image_value, images_in_parts, says
from nvlm.data.record import BadRecord

IMAGE_KEYS = ("images", "image")  # the keys of a row that may hold its images: one, or a list
Picture = str | bytes | Image.Image
"""A path, the bytes of an image's file, or an image in memory."""


def row_images(row: Mapping[str, Any], messages: Sequence[Any] = ()) -> list[Picture]:
    """The images of a row: its `images`, its `image`, or those that the parts of `messages` name. Raises BadRecord."""
    places = {f"`{key}`": listed(row.get(key), key) for key in IMAGE_KEYS}
    places = {"parts of messages": images_in_parts(messages), **places}
    given = {place: images for place, images in places.items() if images}
    if len(given) > 1:
        counts = " and ".join(f"{len(images)} in {place}" for place, images in given.items())
        raise BadRecord(f"images in several places, {counts}: expected them in one")
    return next(iter(given.values()), [])


def listed(value: Any, key: str) -> list[Picture]:
    """The images that the key `key` holds: none, one, or a list. Raises BadRecord, also for a null among them."""
    if isinstance(value, list | tuple):
        return [picture(one, f"image {place} of {len(value)} in `{key}`") for place, one in enumerate(value, start=1)]
    return [picture(value, f"`{key}`")] if isinstance(value, Image.Image) or says(value) else []


def picture(value: Any, what: str) -> Picture:
    """One image; `what` it is, for messages. Raises BadRecord."""
    return value if isinstance(value, Image.Image) else image_value(value, what)


def found(images: Sequence[Picture], root: Path) -> list[Path | bytes | Image.Image]:
    """The images with their paths looked up below `root`, the folder of the images. Raises BadRecord."""
    return [image_path(root, image) if isinstance(image, str) else image for image in images]
