"""Record -> Outline: text runs, tile plans and layouts, from the text and the image headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from nvlm.config.values import Config
from nvlm.data import chat
from nvlm.data.chat import Run
from nvlm.data.images import image_size
from nvlm.data.messages import Turn, check_learns, place_images, read_turns
from nvlm.data.record import BadRecord, Record
from nvlm.data.tokenizer import ChatTokenizer, load_tokenizer
from nvlm.tiling.grid import TilePlan, fit_max_tiles, plan_tiles
from nvlm.tiling.placement import Layout, LayoutRule
from nvlm.tiling.tags import tile_tags


@dataclass(frozen=True, slots=True)
class Encoder:
    """Everything that turns a record into a sample. A value: loader workers receive a copy."""

    layout: LayoutRule
    tokenizer_path: str
    tile_size: int  # px
    tile_tokens: int
    max_tiles: int
    tag: str
    thumbnail_tag: str
    resize: str
    seq_length: int
    cross_length: int
    system: str | None
    max_pixels: int
    bos: str | None
    tokenize: str  # apart, joined or vllm: nvlm.data.chat
    limit: str = "data.seq_length"  # what sets seq_length, for messages

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Loaded once a process."""
        return load_tokenizer(self.tokenizer_path, self.bos)

    @property
    def joined(self) -> bool:
        """Whether an image's first tag is part of the text before it."""
        return self.tokenize != "apart"

    def tags(self, plan: TilePlan) -> tuple[str, ...]:
        """Each tile's tag, thumbnail last."""
        return tile_tags(plan, self.tag, self.max_tiles, self.thumbnail_tag)


@lru_cache(maxsize=256)
def lay_out(encoder: Encoder, plan: TilePlan, first_tag: bool = True) -> Layout:
    """The architecture's layout of one image, its tags tokenised apart from all other text.

    Without `first_tag` the first tag is left out: it is part of the text before the image.
    """
    tags = [encoder.tokenizer.encode(name) for name in encoder.tags(plan)]
    return encoder.layout(plan, tags if first_tag else [(), *tags[1:]])


def build_encoder(config: Config, layout: LayoutRule, resize: str | None = None) -> Encoder:
    """The encoder that `config` asks for, with `resize` in place of the configured one if given."""
    return Encoder(
        layout=layout,
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
    )


@dataclass(frozen=True, slots=True)
class Outline:
    """All of a sample but its pixels: text runs with image slots, and each image's tiles and layout.

    `fewer_tiles`: some image has fewer tiles than `max_tiles` would give it, because they did not fit.
    """

    runs: tuple[Run, ...]
    plans: tuple[TilePlan, ...]
    layouts: tuple[Layout, ...]
    fewer_tiles: bool = False

    def lengths(self, tile_tokens: int) -> tuple[int, int]:
        """Tokens of the text stream, and cross-attended ones."""
        images = [layout.tokens(tile_tokens) for layout in self.layouts]
        text = sum(len(run.ids) for run in self.runs)
        return text + sum(stream for stream, _ in images), sum(cross for _, cross in images)


def outline(record: Record, encoder: Encoder, generate: bool = False) -> Outline:
    """Lay a conversation out, with `generate` as a prompt; reads image headers alone. Raises BadRecord."""
    turns = place_images(read_turns(record.messages), len(record.images))
    if not generate:
        check_learns(turns)
    sizes = [image_size(image, encoder.max_pixels) for image in record.images]
    text = _runs(turns, encoder, generate, [""] * len(sizes))
    room = encoder.seq_length - sum(len(run.ids) for run in text)
    wanted = [plan_tiles(*size, encoder.max_tiles, encoder.tile_size) for size in sizes]
    while True:
        plans = _plan(sizes, room, encoder)
        layouts = tuple(lay_out(encoder, plan, first_tag=not encoder.joined) for plan in plans)
        tags = [encoder.tags(plan)[0] for plan in plans]
        runs = _runs(turns, encoder, generate, tags) if encoder.joined else text
        sketch = Outline(tuple(runs), tuple(plans), layouts, fewer_tiles=plans != wanted)
        over = sketch.lengths(encoder.tile_tokens)[0] - encoder.seq_length
        if over <= 0:
            return sketch
        room -= over  # joined, the first tags are in the text, which is known only with the plans


def _runs(turns: Sequence[Turn], encoder: Encoder, generate: bool, first_tags: Sequence[str]) -> list[Run]:
    form = chat.prompt if generate else chat.chatml
    return form(turns, encoder.tokenizer, encoder.system, encoder.tokenize, first_tags)


def _plan(sizes: Sequence[tuple[int, int]], room: int, encoder: Encoder) -> list[TilePlan]:
    """Tile plans that fit the text stream, and then the cross-attended budget."""
    if room < 0:
        raise BadRecord(f"the text takes {encoder.seq_length - room} tokens, {encoder.limit} is {encoder.seq_length}")
    max_tiles, plans = encoder.max_tiles, []
    budgets = (("text stream", room), ("cross-attention", encoder.cross_length))
    for which, (name, tokens) in enumerate(budgets if sizes else ()):

        def tokens_of(plan: TilePlan, which: int = which) -> int:
            return lay_out(encoder, plan, first_tag=not encoder.joined).tokens(encoder.tile_tokens)[which]

        try:
            plans = fit_max_tiles(sizes, tokens, tokens_of, max_tiles, encoder.tile_size)
        except ValueError as error:
            raise BadRecord(f"images do not fit the {name}: {error}") from None
        max_tiles = max(1, *(plan.num_regular for plan in plans))
    return list(plans)
