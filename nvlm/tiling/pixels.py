"""Cuts an image into uint8 tiles, and normalises them for the encoder.

Loaders emit uint8, a quarter of the size of float32; `normalize` runs on the encoder's device.
Shape legend: T tiles, thumbnail last; 3 channels RGB; tile_size px per side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import PIL
import torch
from PIL import Image
from torchvision.io import ImageReadMode
from torchvision.io import decode_jpeg as decode_file
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from nvlm.tiling.frames import FramePlan
from nvlm.tiling.grid import TilePlan

_DRAFT = 4 / 3  # least size of a reduced source, relative to the grid

# Since version 13, Pillow resizes vertically first if the height shrinks by more than twice as many pixels as the width
# (Pillow pull request 9549), as for the thumbnail of a portrait photograph.
_PILLOW_ORDERS_PASSES = int(PIL.__version__.split(".")[0]) >= 13


def tile_image(image: Image.Image | torch.Tensor, plan: TilePlan, resize: str = "exact") -> torch.Tensor:
    """The tiles of an image: uint8 [T, 3, tile_size, tile_size] with T = plan.num_tiles (NVLM section 4.1).

    The image is resized to the grid of `plan` and cut into tiles; the thumbnail comes last. `plan` is made for the
    image's size, by nvlm.tiling.grid.plan_tiles or nvlm.tiling.anyres.MapTiling.

    resize="exact" is the bicubic filter of the installed Pillow, byte for byte the same as the published preprocessing.
    "fast" is torch's antialiased bicubic on uint8: several times faster, and off by one or two levels in under 1% of
    the values. "draft" is the same, but makes the thumbnail from the resized grid where that is smaller than the image;
    the image may have been decoded at a reduced size (see `draft_size`), and may be a tensor, uint8 [3, h, w].
    Pillow 13 changed its results for images that shrink much more in height than in width, so machines agree on the
    pixels only if all use an older version or all use 13 or later.

    Any Pillow mode is converted to RGB first. Alpha is dropped, not blended, as in the published code. Greyscale of 16
    or 32 bits is scaled so that white is the smallest of 255 and 65535 (for floats also 1) that is not below the
    brightest value, else the brightest value; negative, infinite and NaN values become black. EXIF orientation is not
    applied, as in the published code, so that a plan made from the size in the file header fits the pixels.

    Raises ValueError for an unknown resize.
    """
    if resize not in _RESIZERS:
        raise ValueError(f"resize, got {resize!r}, expected one of {', '.join(_RESIZERS)}, fix: use one")
    tile_size = plan.tile_size
    source = to_rgb(image) if isinstance(image, Image.Image) else image
    whole = (tile_size, tile_size)
    if plan.fill is None:
        *grid, thumbnail = _RESIZERS[resize](source, [plan.picture, whole] if plan.num_regular else [whole])
    else:
        grid = _RESIZERS[resize](source, [plan.picture] if plan.num_regular else [])
        (thumbnail,) = _RESIZERS[resize](_squared(source, plan.fill), [whole])

    pixels = torch.empty((plan.num_tiles, 3, tile_size, tile_size), dtype=torch.uint8)
    pixels[-1] = thumbnail
    if grid:
        cells = _centred(grid[0], plan).unflatten(1, (plan.rows, tile_size)).unflatten(3, (plan.cols, tile_size))
        pixels[:-1].unflatten(0, (plan.rows, plan.cols)).copy_(cells.permute(1, 3, 0, 2, 4))
    return pixels


def tile_frames(frames: Iterable[np.ndarray], plan: FramePlan, resize: str = "exact") -> torch.Tensor:
    """The tiles of a video: uint8 [T, 3, tile_size, tile_size], one for each of `frames`, uint8 [h, w, 3].

    A frame is stretched to a square, padded to one first, or resized by its shorter side and cut in its centre, as
    CLIP's processor does. `resize`: as for `tile_image`; "draft" is "fast".
    """
    resizer, rule = _RESIZERS[resize], plan.rule
    pixels = torch.empty((plan.num_tiles, 3, plan.tile_size, plan.tile_size), dtype=torch.uint8)
    for tile, frame in zip(pixels, frames, strict=True):
        source = Image.fromarray(frame) if resize == "exact" else torch.from_numpy(frame).permute(2, 0, 1)
        if rule.fit == "pad":
            source = _squared(source, rule.fill)
        height, width = frame.shape[:2]
        (made,) = resizer(source, [_covering(width, height, plan.tile_size) if rule.fit == "crop" else tile.shape[1:]])
        top, left = ((side - plan.tile_size) // 2 for side in made.shape[1:])
        tile.copy_(made[:, top : top + plan.tile_size, left : left + plan.tile_size])
    return pixels


def _covering(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height) of a picture whose shorter side becomes `side` px."""
    shorter = min(width, height)
    return int(side * width / shorter), int(side * height / shorter)


def _centred(picture: torch.Tensor, plan: TilePlan) -> torch.Tensor:
    """`picture` uint8 [3, h, w] in the centre of a black one of the grid's size, as LLaVA-NeXT pads."""
    height, width = picture.shape[1:]
    if (height, width) == (plan.height, plan.width):
        return picture
    top, left = (plan.height - height) // 2, (plan.width - width) // 2
    padded = picture.new_zeros(3, plan.height, plan.width)
    padded[:, top : top + height, left : left + width] = picture
    return padded


def _squared(source: Image.Image | torch.Tensor, fill: Sequence[int]) -> Image.Image | torch.Tensor:
    """The image in the centre of a square of the colour `fill` (LLaVA's expand2square)."""
    if isinstance(source, Image.Image):
        side = max(source.size)
        square = Image.new("RGB", (side, side), tuple(fill))
        square.paste(source, ((side - source.width) // 2, (side - source.height) // 2))
        return square
    height, width = source.shape[1:]
    side = max(height, width)
    square = torch.tensor(fill, dtype=torch.uint8)[:, None, None].expand(3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = source
    return square


def draft_size(plan: TilePlan) -> tuple[int, int]:
    """(width, height) in px that is enough for a source that is cut with resize="draft": 4/3 of the grid's.

    JPEG's reduced sizes are block averages. The closer they are to the grid's size, the more they blur thin lines;
    below 4/3 of it, twice as many values are off as at 3/2 (benchmarks/loader.py).
    """
    return math.ceil(plan.width * _DRAFT), math.ceil(plan.height * _DRAFT)


def decode_jpeg(data: bytes, size: tuple[int, int]) -> torch.Tensor | None:
    """uint8 [3, h, w] of a JPEG file of `size` (width, height) in RGB; None if torchvision cannot decode it.

    The same pixels as Pillow's, but not by way of Pillow's four bytes per pixel.
    """
    try:
        pixels = decode_file(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:  # Pillow accepts some files that torchvision refuses, and explains what is wrong with others
        return None
    return pixels if pixels.shape[1:] == (size[1], size[0]) else None


def normalize(
    pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 [..., 3, h, w] to dtype, normalised by the encoder's mean and standard deviation of RGB values from 0 to 1.

    Computed in float32 and rounded to dtype once; in float32 bit-equal to torchvision's transforms. Raises ValueError
    for other shapes or dtypes.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim < 3 or pixels.shape[-3] != 3:
        raise ValueError(
            f"pixels to normalise, got {pixels.dtype} {tuple(pixels.shape)}, expected uint8 [..., 3, h, w], "
            "fix: pass what tile_image returns"
        )
    # On CUDA, torch divides by a Python number through its reciprocal, one bit off; dividing by a tensor is exact.
    white = torch.full((), 255.0, device=pixels.device)
    shift, scale = (_by_channel(values, pixels.device) for values in (mean, std))
    # In place: the tiles of a whole window take a gigabyte in float32, and one copy is enough.
    return pixels.to(torch.float32).div_(white).sub_(shift).div_(scale).to(dtype)


def _by_channel(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """[3, 1, 1], filled on the device: a copy from the host would wait until the GPU has no other work."""
    return torch.cat([torch.full((1, 1, 1), value, device=device) for value in values])


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, by the rules in `tile_image`."""
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _wide_to_8bit(image).convert("RGB")
    if "transparency" in image.info:
        # Pillow would convert the transparent colour too, and fails on values found in unusual files.
        image = image.copy()
        del image.info["transparency"]
    if image.mode == "La":
        image = image.convert("LA")  # Pillow cannot convert premultiplied grey to RGB directly
    return image.convert("RGB")


def _wide_to_8bit(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float32), nan=0, posinf=0, neginf=0)
    brightest = float(values.max())
    levels = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    white = next((level for level in levels if brightest <= level), brightest)
    if white == 255:
        # Already on the 8-bit scale: drop fractions, as Pillow's own conversion does.
        return Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return Image.fromarray((values.clip(0, white) / white * 255 + 0.5).astype(np.uint8))


def _resize_exact(rgb: Image.Image, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Each (width, height) px as uint8 [3, height, width], by Pillow."""
    return [_to_tensor(rgb.resize(size, Image.Resampling.BICUBIC)) for size in sizes]


def _resize_fast(rgb: Image.Image | torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Each (width, height) px as uint8 [3, height, width], by torch."""
    source = _to_tensor(rgb)
    return [_bicubic(_order_passes(source, *size), *size) for size in sizes]


def _resize_draft(rgb: Image.Image | torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Each (width, height) px as uint8 [3, height, width], by torch, from the one before if that was made smaller."""
    source = _to_tensor(rgb)
    resized: list[torch.Tensor] = []
    for width, height in sizes:
        resized.append(_bicubic(_order_passes(source, width, height), width, height))
        if width <= source.shape[2] and height <= source.shape[1]:
            source = resized[-1]
    return resized


def _order_passes(source: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Do the vertical pass first if Pillow does; torch always starts with the horizontal pass."""
    # Values are rounded and clipped to bytes between the passes, so the order matters: on photographs, a quarter of the
    # values differ, by up to 16 levels.
    old_height, old_width = source.shape[1:]
    shrinks_in_height = old_height - height > max(0, 2 * (old_width - width))
    if _PILLOW_ORDERS_PASSES and shrinks_in_height:
        return _bicubic(source, old_width, height)
    return source


def _bicubic(source: torch.Tensor, width: int, height: int) -> torch.Tensor:
    return transforms.resize(source, [height, width], InterpolationMode.BICUBIC, antialias=True)


def _to_tensor(rgb: Image.Image | torch.Tensor) -> torch.Tensor:
    """uint8 [3, h, w] as a view of Pillow's interleaved memory, for which torch's resize is vectorised."""
    return rgb if isinstance(rgb, torch.Tensor) else torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


_RESIZERS = {"exact": _resize_exact, "fast": _resize_fast, "draft": _resize_draft}
