"""The number of tokens per image or video: exact with a tokenizer, else from the preset's tag length.

Also the work in a sample with one image or video, for estimates.
"""

from __future__ import annotations

from nvlm.arch.registry import placement_rule
from nvlm.config.tiles import frames_of, tiling_of
from nvlm.config.values import Config, problem
from nvlm.data.amounts import Work
from nvlm.data.text.tokenizer import tokenizer_of
from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import Placement
from nvlm.tiling.tags import tile_tags

_TEXT = 16  # the shortest question and answer with their ChatML marks, tokens


def tag_ids(config: Config, plan: TilePlan) -> list[tuple[int, ...]]:
    """Token ids of each tile's tag, thumbnail last; placeholders of `llm.tag_tokens` ids if there is no tokenizer."""
    names = tile_tags(plan, config.tiling.tag, config.tiling.max_tiles, config.llm.thumbnail_tag)
    if config.llm.tokenizer is None:
        return [(0,) * (config.llm.tag_tokens if name else 0) for name in names]
    tokenizer = tokenizer_of(config.llm)
    return [tokenizer.encode(name) for name in names]


def image_tokens(config: Config, plan: TilePlan) -> tuple[int, int]:
    """Number of an image's tokens in the text stream, without its `<Image>` marks, and of cross-attended tokens."""
    return place(config, plan).lengths


def place(config: Config, plan: TilePlan) -> Placement:
    """The placement of an image or a video with the tile plan `plan`."""
    return placement_rule(config.arch.name)(plan, tag_ids(config, plan), plan.tokens(config.vision.tile_tokens))


def plan_of(config: Config, tiles: int, frames: int = 0) -> TilePlan | None:
    """The plan of a video of `frames` frames, or else of an image with `tiles` regular tiles; None if both are 0."""
    if frames:
        return frames_of(config.video, config.tiling, config.vision).of(frames)
    return tiling_of(config.tiling, config.vision).of(tiles) if tiles else None


def sample_work(config: Config, text: int, plan: TilePlan | None) -> Work:
    """The work in a sample of one image or video, if there is a `plan`, then `text` tokens with labels."""
    if plan is None:
        return Work(tokens=text, pairs=text * (text + 1) // 2, outputs=text)
    placement = place(config, plan)
    stream, keys = placement.lengths
    of_tile = [sum(p.length for p in placement.cross if p.tile == tile) for tile in range(plan.num_tiles)]
    seen = sum(p.length * (of_tile[p.tile] if p.own_tile else keys) for p in placement.stream)
    tokens = stream + text
    return Work(
        tokens=tokens,
        pairs=tokens * (tokens + 1) // 2,
        outputs=text,
        tiles=plan.num_tiles,
        projected=sum(placement.from_tiles),
        keys=keys,
        cross_pairs=seen + text * keys,
    )


def most_image_tokens(config: Config) -> tuple[int, int]:
    """The largest `image_tokens` of any image."""
    plans = tiling_of(config.tiling, config.vision).full(config.tiling.max_tiles)
    streams, crosses = zip(*(image_tokens(config, plan) for plan in plans))
    return max(streams), max(crosses)


def check_lengths(config: Config) -> Config:
    """Return `config`, or raise ConfigError if one image with all its tiles and tags does not fit."""
    stream, cross = most_image_tokens(config)
    image = f"one image of {config.tiling.max_tiles} tiles with its tags"
    if config.data.seq_length < stream + _TEXT:
        raise problem(
            "data.seq_length",
            config.data.seq_length,
            f"at least {stream + _TEXT} tokens: {stream} for {image} in the text stream of "
            f"arch={config.arch.name}, {_TEXT} for text",
            f"data.seq_length={stream + _TEXT}, or fewer tiling.max_tiles",
        )
    if config.data.cross_length < cross:
        fix = f"data.cross_length={cross}, or fewer tiling.max_tiles"
        raise problem("data.cross_length", config.data.cross_length, f"at least {cross} tokens for {image}", fix)
    return config


def check_vocabulary(config: Config) -> None:
    """Raise ConfigError if the tokenizer is missing, or has tokens without an embedding in the model."""
    vocab = tokenizer_of(config.llm).vocab
    if vocab > config.llm.vocab:
        raise problem("llm.vocab", config.llm.vocab, f"at least the tokenizer's {vocab}", f"llm.vocab={vocab}")
