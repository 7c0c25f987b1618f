"""How a record's images and videos become tiles and placements, within a sample's budgets. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from nvlm.config.tiles import Tiling
from nvlm.data.images import image_size
from nvlm.data.record import TooLong
from nvlm.data.video.choose import frame_numbers
from nvlm.data.video.clip import Video, read_header
from nvlm.tiling.frames import FrameTiling
from nvlm.tiling.grid import TilePlan, fit_max_tiles
from nvlm.tiling.placement import Placement

if TYPE_CHECKING:
    from nvlm.data.outline import Processor

Size = tuple[int, ...]
"""Width and height of an image, px, from its header; of a video also the number of frames that are used."""
Sizes = tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class Pictures:
    """How a record's images and videos become tiles. Planned once, from their headers; later steps follow the plan.

    `fewer_tiles`: some image has fewer tiles than `max_tiles` would give it, because they did not fit.
    """

    sizes: Sizes
    plans: tuple[TilePlan, ...]
    fewer_tiles: bool


def sizes_of(pictures: Sequence[Any], processor: Processor) -> Sizes:
    """The sizes of a record's images and videos, from their headers. Raises BadRecord."""
    return tuple(size_of(picture, processor) for picture in pictures)


def size_of(picture: Any, processor: Processor) -> Size:
    """The size of an image or a video. Raises BadRecord."""
    if not isinstance(picture, Video):
        return image_size(picture, processor.max_pixels)
    video = processor.video
    header = read_header(picture, processor.max_pixels, video.max_seconds)
    return header.width, header.height, len(frame_numbers(header.frames, header.rate, video.frames, video.rate))


@lru_cache(maxsize=4096)
def place(processor: Processor, plan: TilePlan, first_tag: bool = True) -> Placement:
    """The architecture's placement of one image, with tags tokenised separately from other text.

    With `first_tag` false, the first tag is left out: it is part of the text before the image.
    """
    tags = [processor.tokenizer.encode(name) for name in processor.tags(plan)]
    return processor.placement(plan, tags if first_tag else [(), *tags[1:]], plan.tokens(processor.tile_tokens))


def plan_pictures(sizes: Sizes, words: int, processor: Processor) -> Pictures:
    """The tiles of images and videos of these `sizes`, beside `words` tokens of text.

    Raises BadRecord if they do not fit with one tile each.
    """
    wanted = wanted_plans(sizes, processor)
    plans = _plan(sizes, processor.seq_length - words, wanted, processor)
    return Pictures(sizes, plans, plans != wanted)


def wanted_plans(sizes: Sizes, processor: Processor) -> tuple[TilePlan, ...]:
    """The plans of images and videos of these `sizes`, if there is room for them."""
    most = processor.most_tiles(len(sizes))
    return tuple(_tiles(processor.tiling, processor.frames, *size, most) for size in sizes)


def least_plans(sizes: Sizes, processor: Processor) -> list[TilePlan]:
    """The plans of images and videos of these `sizes` with one tile each."""
    return [_tiles(processor.tiling, processor.frames, *size, 1) for size in sizes]


def _plan(sizes: Sizes, room: int, wanted: tuple[TilePlan, ...], processor: Processor) -> tuple[TilePlan, ...]:
    """Tile plans that fit the text stream and the cross-attention budget; `wanted`: those for processor.max_tiles."""
    if room < 0:
        raise TooLong(
            f"the text takes {processor.seq_length - room} tokens, {processor.limit} is {processor.seq_length}"
        )
    max_tiles, plans = processor.most_tiles(len(sizes)), wanted
    budgets = (("text stream", room), ("cross-attention", processor.cross_length))
    for which, (name, tokens) in enumerate(budgets if sizes else ()):

        def tokens_of(plan: TilePlan, which: int = which) -> int:
            return image_lengths(processor, plan)[which]

        if sum(map(tokens_of, plans)) <= tokens:  # as almost always
            continue
        try:
            plans = fit_max_tiles(
                sizes, tokens, tokens_of, max_tiles, partial(_tiles, processor.tiling, processor.frames)
            )
        except ValueError as error:
            raise TooLong(f"images do not fit the {name}: {error}") from None
        max_tiles = max(1, *(plan.num_regular for plan in plans))
    return plans


@lru_cache(maxsize=1 << 14)
def _tiles(images: Tiling, videos: FrameTiling, width: int, height: int, *frames_and_most: int) -> TilePlan:
    """The plan of a picture; the last argument limits the tiles of an image."""
    *frames, most = frames_and_most
    return videos.of(*frames) if frames else images(width, height, most)


@lru_cache(maxsize=4096)
def image_lengths(processor: Processor, plan: TilePlan) -> tuple[int, int]:
    """Number of tokens of an image in the text stream and among the keys, without a first tag that is joined with the
    text."""
    return place(processor, plan, first_tag=not processor.joined).lengths
