"""Record -> Outline: text runs, tile plans and placements, from the text and the image headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from nvlm.config.tiles import Tiling, frames_of, tiling_of
from nvlm.config.values import Config
from nvlm.config.video import VideoConfig
from nvlm.data.cut import cut
from nvlm.data.draw import happens
from nvlm.data.front import images_in_front
from nvlm.data.messages import DOCUMENT, Turn, check_learns, place_images, read_turns
from nvlm.data.plans import Pictures, Sizes, image_lengths, least_plans, place, plan_pictures, sizes_of
from nvlm.data.record import ImageChanged, Record, TooLong
from nvlm.data.text import chat
from nvlm.data.text.assemble import Run
from nvlm.data.text.tokenizer import ChatTokenizer, load_tokenizer
from nvlm.tiling.frames import FrameTiling
from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import Placement, PlacementRule
from nvlm.tiling.tags import tile_tags


@dataclass(frozen=True, slots=True)
class Processor:
    """Everything that turns a record into a sample. A plain value, copied to loader workers."""

    placement: PlacementRule
    tiling: Tiling  # of images
    frames: FrameTiling  # of videos
    video: VideoConfig
    tokenizer_path: str
    tile_size: int  # px
    tile_tokens: int  # per tile
    max_tiles: int
    tag: str
    thumbnail_tag: str
    resize: str
    seq_length: int
    cross_length: int
    system: str | None
    max_pixels: int
    bos: str | None
    tokenize: str  # apart, joined or vllm: nvlm.data.text.chat
    chat: str = "chatml"  # the chat format: nvlm.data.text.formats
    image_marks: bool = True  # `<Image>` and `</Image>` around each image
    several: str = "same"  # base: images of a record with several get one tile each
    images_first: float = 0.0  # the share of records whose images all go in front: nvlm.data.front
    seed: int = 0  # draws these
    sees: str = "before"  # the images that a token cross-attends: before, or the latest
    limit: str = "data.seq_length"  # the setting behind seq_length, for messages

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Loaded once per process."""
        return load_tokenizer(self.tokenizer_path, self.bos, chat=self.chat, marks=self.image_marks)

    @property
    def joined(self) -> bool:
        """Whether an image's first tag is part of the text before it."""
        return self.tokenize != "apart"

    def most_tiles(self, images: int) -> int:
        """The limit on tiles of each image of a record with so many images."""
        return 1 if self.several == "base" and images > 1 else self.max_tiles

    def tags(self, plan: TilePlan) -> tuple[str, ...]:
        """Each tile's tag, thumbnail last."""
        return tile_tags(plan, self.tag, self.max_tiles, self.thumbnail_tag)


def build_processor(config: Config, placement: PlacementRule, resize: str | None = None) -> Processor:
    """The processor for `config`. `resize`, if given, overrides the configured method."""
    return Processor(
        placement=placement,
        tiling=tiling_of(config.tiling, config.vision),
        frames=frames_of(config.video, config.tiling, config.vision),
        video=config.video,
        tokenizer_path=config.llm.tokenizer or "",
        tile_size=config.vision.tile_size,
        tile_tokens=config.vision.tile_tokens,
        max_tiles=config.tiling.max_tiles,
        tag=config.tiling.tag,
        thumbnail_tag=config.llm.thumbnail_tag,
        resize=resize or config.tiling.resize,
        seq_length=config.data.seq_length,
        cross_length=config.data.cross_length,
        system=config.data.system,
        max_pixels=config.data.max_pixels,
        bos=config.llm.bos,
        tokenize=config.data.tokenize,
        chat=config.llm.chat,
        image_marks=config.data.image_marks,
        several=config.tiling.several,
        images_first=config.data.images_first,
        seed=config.seed,
        sees=config.arch.sees,
    )


@dataclass(frozen=True, slots=True)
class Outline:
    """A sample without its pixels: text runs with image slots, and each image's tiles and placement."""

    runs: tuple[Run, ...]
    pictures: Pictures
    placements: tuple[Placement, ...]
    cut: bool = False  # a document of which only the beginning fits

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of tokens in the text stream, and of cross-attended tokens."""
        images = [placement.lengths for placement in self.placements]
        text = sum(len(run.ids) for run in self.runs)
        return text + sum(stream for stream, _ in images), sum(cross for _, cross in images)


def outline(record: Record, processor: Processor, generate: bool = False, pictures: Pictures | None = None) -> Outline:
    """Outline a conversation, with `generate` as a prompt. Reads only image headers. Raises BadRecord.

    A document that is longer than a sample is cut, unless it is a prompt; the images behind the cut are left out.

    `pictures`: from an earlier outline of the same record; if given, no header is read and nothing is planned.
    """
    turns = turns_of(record, processor, generate)
    if not generate:
        check_learns(turns)
    if turns[0].role == DOCUMENT and not generate:
        return _document(turns, record.images, processor, pictures)
    if pictures is not None:
        if len(pictures.plans) != len(record.images):
            raise ImageChanged(f"{len(record.images)} images, {len(pictures.plans)} when they were planned")
        return _outline(turns, pictures, processor, generate)
    text, sizes = text_and_sizes(record, turns, processor, generate)
    words = text_tokens(text)
    while True:
        sketch = _outline(turns, plan_pictures(sizes, words, processor), processor, generate, text)
        over = sketch.lengths[0] - processor.seq_length
        if over <= 0:
            return sketch
        words += over  # if joined, the text contains the first tags, which are known only after planning


def text_and_sizes(
    record: Record, turns: Sequence[Turn], processor: Processor, generate: bool = False
) -> tuple[list[Run], Sizes]:
    """The runs of a record's text, as they are before images are planned, and the sizes of its images. Raises
    BadRecord."""
    sizes = sizes_of(record.images, processor)
    return _runs(turns, processor, generate, [""] * len(sizes)), sizes


def text_tokens(runs: Sequence[Run]) -> int:
    """Number of tokens of a record's text, its images' marks included."""
    return sum(len(run.ids) for run in runs)


def _document(turns: Sequence[Turn], images: Sequence[Any], processor: Processor, pictures: Pictures | None) -> Outline:
    text = _runs(turns, processor, False, [""] * len(images))
    if pictures is None:
        return beginning(text, sizes_of(images, processor), processor)
    if len(pictures.plans) > len(images):
        raise ImageChanged(f"{len(images)} images, {len(pictures.plans)} when they were planned")
    return _cut_document(text, pictures, processor)


def beginning(text: Sequence[Run], sizes: Sizes, processor: Processor) -> Outline:
    """A document, or as much of it as fits: images get fewer tiles before text is cut. Depends only on the lengths of
    the runs. Raises BadRecord."""
    return _cut_document(text, _pictures_of_beginning(text, sizes, processor), processor)


def _cut_document(text: Sequence[Run], pictures: Pictures, processor: Processor) -> Outline:
    placements = tuple(place(processor, plan) for plan in pictures.plans)
    kept = cut(text, [placement.lengths[0] for placement in placements], processor.seq_length)
    if sum(len(run.ids) for run in kept if run.trained) - (bool(kept) and kept[0].trained) < 1:  # the first is given
        raise TooLong(f"no text of the document fits {processor.limit}={processor.seq_length} beside its first image")
    return Outline(tuple(kept), pictures, placements, cut=kept != text)


def _pictures_of_beginning(text: Sequence[Run], sizes: Sizes, processor: Processor) -> Pictures:
    """The images of a document that fit: all, with as many tiles as fit, or with one tile each the first of them."""
    least = least_plans(sizes, processor)
    lengths = [image_lengths(processor, plan) for plan in least]
    seen = sum(total <= processor.cross_length for total in accumulate(cross for _, cross in lengths))
    stream = [stream for stream, _ in lengths[:seen]]
    if seen == len(sizes) and text_tokens(text) + sum(stream) <= processor.seq_length:
        return plan_pictures(sizes, text_tokens(text), processor)
    kept = sum(run.image is not None for run in cut(text, stream, processor.seq_length))
    return Pictures(sizes[:kept], tuple(least[:kept]), fewer_tiles=processor.max_tiles > 1 and kept > 0)


def turns_of(record: Record, processor: Processor, generate: bool = False) -> list[Turn]:
    """The record's turns with its images at their places, which for training may all be in front. Raises BadRecord."""
    turns = place_images(read_turns(record.messages), len(record.images))
    share = 0 if generate else processor.images_first
    if share and happens(processor.seed, record.id, "images first", share):
        return images_in_front(turns)
    return turns


def unreadable(lengths: tuple[int, int], pictures: Pictures, processor: Processor) -> Outline:
    """An outline of the same lengths, tiles and keys as planned, for a record that can no longer be read: nothing in it
    is trained on."""
    placements = tuple(place(processor, plan, first_tag=not processor.joined) for plan in pictures.plans)
    words = lengths[0] - sum(placement.lengths[0] for placement in placements)
    return Outline((Run((0,) * words), *(Run(image=i) for i in range(len(placements)))), pictures, placements)


def _outline(
    turns: Sequence[Turn],
    pictures: Pictures,
    processor: Processor,
    generate: bool,
    text: Sequence[Run] | None = None,
) -> Outline:
    """`text`: the runs without tags, if already known; used unless the first tags are joined with the text."""
    placements = tuple(place(processor, plan, first_tag=not processor.joined) for plan in pictures.plans)
    if processor.joined or text is None:
        text = _runs(turns, processor, generate, [processor.tags(plan)[0] for plan in pictures.plans])
    return Outline(tuple(text), pictures, placements)


def _runs(turns: Sequence[Turn], processor: Processor, generate: bool, first_tags: Sequence[str]) -> list[Run]:
    return chat.runs(turns, processor.tokenizer, processor.system, processor.tokenize, first_tags, generate)
