"""Pictures inside the page: small JPEG files as data URLs, each of a limited size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from nvlm.data.outline import Processor
from nvlm.data.record import Record
from nvlm.data.stills import still
from nvlm.inspect.document import data_url
from nvlm.tiling.frames import FramePlan
from nvlm.tiling.grid import TilePlan
from nvlm.tiling.pixels import to_rgb

_PICTURE, _TILE = (800, 60_000), (144, 8_000)  # the longest side in px, and the most bytes
MOST_IMAGES, MOST_TILES = 4, 13  # shown of a record and of an image


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile as the encoder sees it. `number`: of the image's tiles or the video's frames, from 1; None: the
    thumbnail."""

    url: str
    tag: str
    number: int | None


@dataclass(frozen=True, slots=True)
class Picture:
    """An image, or the first frame of a video, and its tiles, of which at most MOST_TILES are shown. `size`: px;
    `columns`, `rows`: of the grid."""

    url: str
    size: tuple[int, int]
    columns: int
    rows: int
    tiles: tuple[Tile, ...]
    hidden: int  # tiles that are not shown


def pictures(record: Record, plans: Sequence[TilePlan], pixels: Tensor, processor: Processor) -> list[Picture]:
    """The first images of `record`, with their tiles; `pixels`: uint8 [T, 3, px, px], of all its tiles."""
    parts = pixels.split([plan.num_tiles for plan in plans]) if plans else ()
    shown = zip(record.images[:MOST_IMAGES], plans, parts)
    return [_picture(source, plan, tiles, processor) for source, plan, tiles in shown]


def _picture(source, plan: TilePlan, pixels: Tensor, processor: Processor) -> Picture:
    image = to_rgb(still(source, processor.max_pixels, processor.video))
    tags, last = processor.tags(plan), plan.num_tiles - 1
    # The thumbnail, or a video's last frame, is always among the tiles that are shown.
    shown = [*range(min(last, MOST_TILES - 1)), last]
    tiles = tuple(
        Tile(
            data_url(Image.fromarray(pixels[number].permute(1, 2, 0).numpy()), *_TILE),
            tags[number],
            None if number == last and not isinstance(plan, FramePlan) else number + 1,
        )
        for number in shown
    )
    return Picture(
        data_url(image, *_PICTURE), image.size, plan.cols, plan.rows, tiles, hidden=plan.num_tiles - len(shown)
    )
