"""Record -> Sample: tile plans, tags as text, placeholder runs of exactly K per tile, labels, visibility numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch

from nvlm.batch import ALL_TILES, IGNORE, IMAGE, PAD, BadRecord, Record, Sample
from nvlm.config import Config
from nvlm.data import chat
from nvlm.data.chat import Run
from nvlm.data.sources import decode_image, image_size
from nvlm.data.tokenizer import ChatTokenizer, load_tokenizer
from nvlm.layout import Layout, LayoutRule
from nvlm.tiling import fit_max_tiles, tile_image, tile_tags
from nvlm.tiling.grid import TilePlan


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
    joined: bool  # an image's first tag is tokenised joined with the text before it
    limit: str = "data.seq_length"  # what sets seq_length, for messages

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Loaded once a process."""
        return load_tokenizer(self.tokenizer_path, self.bos)

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
        joined=config.data.tokenize == "joined",
    )


@dataclass(frozen=True, slots=True)
class Outline:
    """All of a sample but its pixels: text runs with image slots, and each image's tiles and layout."""

    runs: tuple[Run, ...]
    plans: tuple[TilePlan, ...]
    layouts: tuple[Layout, ...]

    def lengths(self, tile_tokens: int) -> tuple[int, int]:
        """Tokens of the text stream, and cross-attended ones."""
        images = [layout.tokens(tile_tokens) for layout in self.layouts]
        text = sum(len(run.ids) for run in self.runs)
        return text + sum(stream for stream, _ in images), sum(cross for _, cross in images)


def outline(record: Record, encoder: Encoder, generate: bool = False) -> Outline:
    """Lay a conversation out, with `generate` as a prompt; reads image headers alone. Raises BadRecord."""
    turns = chat.place_images(chat.texts(record.messages), len(record.images))
    if not generate and not any(role == "assistant" for role, _ in turns):
        raise BadRecord("no assistant turn to learn from")
    sizes = [image_size(image, encoder.max_pixels) for image in record.images]
    text = _runs(turns, encoder, generate, [""] * len(sizes))
    room = encoder.seq_length - sum(len(run.ids) for run in text)
    while True:
        plans = _plan(sizes, room, encoder)
        layouts = tuple(lay_out(encoder, plan, first_tag=not encoder.joined) for plan in plans)
        tags = [encoder.tags(plan)[0] for plan in plans]
        runs = _runs(turns, encoder, generate, tags) if encoder.joined else text
        sketch = Outline(tuple(runs), tuple(plans), layouts)
        over = sketch.lengths(encoder.tile_tokens)[0] - encoder.seq_length
        if over <= 0:
            return sketch
        room -= over  # joined, the first tags are in the text, which is known only with the plans


def _runs(turns: list[tuple[str, str]], encoder: Encoder, generate: bool, first_tags: Sequence[str]) -> list[Run]:
    form = chat.prompt if generate else chat.chatml
    return form(turns, encoder.tokenizer, encoder.system, first_tags if encoder.joined else None)


def encode(record: Record, encoder: Encoder, generate: bool = False) -> Sample:
    """Encode a conversation for training, or with `generate` as a prompt for its next turn. Raises BadRecord."""
    sketch = outline(record, encoder, generate)
    return _assemble(record.id, sketch, _tiles(record, sketch.plans, encoder), encoder.tile_tokens)


def _tiles(record: Record, plans: Sequence[TilePlan], encoder: Encoder) -> torch.Tensor:
    """uint8 [T, 3, px, px] of all images that `plans` cover."""
    parts = [torch.zeros(0, 3, encoder.tile_size, encoder.tile_size, dtype=torch.uint8)]
    for source, plan in zip(record.images, plans):
        image = decode_image(source, encoder.max_pixels)
        tiled = tile_image(image, max(plan.num_regular, 1), encoder.resize, encoder.tile_size)
        assert tiled.plan == plan, "tile_image and plan_tiles disagree"
        parts.append(tiled.pixels)
    return torch.cat(parts)


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


def _assemble(name: str, sketch: Outline, pixels: torch.Tensor, tile_tokens: int) -> Sample:
    runs, layouts = sketch.runs, sketch.layouts
    first_tile = [0, *accumulate(plan.num_tiles for plan in sketch.plans)]
    tokens: list[int] = []
    trained: list[bool] = []
    image_of: list[int] = []
    tile_of: list[int] = []
    stream_tiles: list[int] = []

    def add(ids: Sequence[int], learns: bool, image: int, tile: int) -> None:
        tokens.extend(ids)
        trained.extend([learns] * len(ids))
        image_of.extend([image] * len(ids))
        tile_of.extend([tile] * len(ids))

    latest = PAD
    for run in runs:
        if run.image is None:
            add(run.ids, run.trained, latest, ALL_TILES)
            continue
        latest = run.image
        for piece in layouts[run.image].stream:
            if piece.ids is None:
                stream_tiles.append(first_tile[run.image] + piece.tile)
            ids = [IMAGE] * tile_tokens if piece.ids is None else piece.ids
            add(ids, False, latest, piece.tile if piece.own_tile else ALL_TILES)

    cross = [(image, piece) for image, lay in enumerate(layouts) for piece in lay.cross]
    lengths = [piece.length(tile_tokens) for _, piece in cross]
    tags = {(image, piece.tile): piece.ids for image, piece in cross if piece.ids is not None}
    cross_tokens = [i for _, piece in cross for i in (piece.ids if piece.ids is not None else [IMAGE] * tile_tokens)]
    tiles = [(image, piece.tile) for image, piece in cross if piece.ids is None]
    # The logits at t predict the token at t + 1, so a label stands one place before its token.
    labels = [tokens[t] if trained[t] else IGNORE for t in range(1, len(tokens))] + [IGNORE]

    def long(values) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.long)

    return Sample(
        id=name,
        tokens=long(tokens),
        labels=long(labels),
        image=long(image_of),
        tile=long(tile_of),
        stream_tiles=long(stream_tiles),
        cross_tokens=long(cross_tokens),
        cross_image=long(i for (i, _), n in zip(cross, lengths) for _ in range(n)),
        cross_tile=long(p.tile for (_, p), n in zip(cross, lengths) for _ in range(n)),
        cross_tiles=long(first_tile[i] + t for i, t in tiles),
        cross_tags=tuple(tags.get(key, ()) for key in tiles),
        pixels=pixels,
    )
