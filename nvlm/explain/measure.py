"""Measures what an answer's tokens read through the gated cross-attention: `looks_of`.

The answer, already given, is read once more in one forward pass, during which each gated layer's input is kept; so
generation is not changed. Hiding one tile at a time then shows what the answer depends on.

Shapes: N answer tokens, X keys, T tiles; batches have one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from nvlm.arch.base import VisionLanguageModel
from nvlm.arch.registry import placement_rule
from nvlm.attention.cache import generating
from nvlm.attention.visibility import unseen_keys
from nvlm.data.batch import IMAGE, PAD, Batch, Sample
from nvlm.data.outline import Processor, build_processor
from nvlm.data.pack import collate
from nvlm.explain.looks import Looks, Tile, Token
from nvlm.explain.read import Columns, Read, read
from nvlm.explain.watch import watched
from nvlm.generate.generator import Answer, Generator
from nvlm.generate.score import columns_of, followed, log_probabilities
from nvlm.generate.text import TextStream
from nvlm.processes import device
from nvlm.tiling.grid import TilePlan

_NEVER = 1 << 40  # the number of an image that no column has begun


def looks_of(generator: Generator, prompt: Sample, answer: Sequence[int], plans: Sequence[TilePlan]) -> Looks:
    """What the tokens `answer` read, given in reply to `prompt`, whose images were cut by `plans`.

    A collective call of a replica's ranks, which all get the result. `nvlm.explain.check` says which models and layouts
    can be explained; the prompt has at least one cross-attended tile. Reads the whole row once, and once more for each
    tile.
    """
    config = generator.config
    processor = build_processor(config, placement_rule(config.arch.name))
    (model,) = generator.pipeline.parts
    where, tiles = generator.device, _tiles_of(prompt)
    row = collate([[followed(prompt, answer)]], config.vision.tile_size, config.row_multiple).to(where)
    (batch,) = generator.vision.encode([row])
    columns, answer_N = columns_of(prompt, answer), torch.tensor(answer, device=where)
    columns_N = torch.tensor(columns, device=where)
    own_TX = torch.stack([_keys_of(batch, *tile) for tile in tiles])
    with generating([model]), device.untranslated():
        with watched(model) as seen:
            logs_N = _log_probabilities(model, batch, columns, answer_N)
        words_X = batch.cross_tokens[0] != IMAGE
        visible_NX = ~unseen_keys(batch, columns_N)[0, 0]
        asked = Columns(columns_N, visible_NX, own_TX.T.float(), (own_TX & words_X).T.float())
        found = [read(layer, seen.keys_XBH, asked) for layer in seen.layers]
        blind_TN = torch.stack(
            [_log_probabilities(model, _without(batch, own_X), columns, answer_N) for own_X in own_TX]
        )
    return Looks(
        arch=model.architecture.description.title,
        tokens=_tokens(answer, logs_N.exp().tolist(), processor),
        grids=tuple((plan.cols, plan.rows) for plan in plans),
        tiles=tuple(Tile(image, tile, processor.tags(plans[image])[tile]) for image, tile in tiles),
        layers=tuple(layer.number for layer in seen.layers),
        gates=_numbers(torch.cat([layer.attention.gate.detach() for layer in seen.layers]).float().tanh()),
        effect=_numbers(logs_N[:, None] - blind_TN.T),
        **{part.name: np.stack([_numbers(getattr(one, part.name)) for one in found]) for part in fields(Read)},
    )


def explained(generator: Generator, answer: Answer) -> Looks:
    """What the tokens of one of `generator`'s answers read."""
    return looks_of(generator, answer.prompt, answer.ids, answer.sketch.pictures.plans)


def _tiles_of(prompt: Sample) -> list[tuple[int, int]]:
    """(image, tile) of the cross-attended tiles, in order."""
    pairs = torch.stack((prompt.cross_image, prompt.cross_tile), dim=1)
    return [(image, tile) for image, tile in pairs.unique(dim=0).tolist()]


def _keys_of(batch: Batch, image: int, tile: int) -> Tensor:
    """[X]: whether a key is a tile's token or its tag."""
    shows_X = (batch.cross_image[0] == image) & (batch.cross_tile[0] == tile)
    return shows_X & (batch.cross_sample[0] != PAD)


def _without(batch: Batch, keys_X: Tensor) -> Batch:
    """`batch` with the keys marked in `keys_X` hidden from all columns."""
    return replace(batch, cross_image=batch.cross_image.masked_fill(keys_X, _NEVER))


def _log_probabilities(model: VisionLanguageModel, batch: Batch, columns: range, answer_N: Tensor) -> Tensor:
    """Of each answer token, [N]."""
    return log_probabilities(model, batch, columns).gather(1, answer_N[:, None])[:, 0]


def _tokens(answer: Sequence[int], probabilities: Sequence[float], processor: Processor) -> tuple[Token, ...]:
    """The answer's tokens with their texts; a token that ends it is shown by its name."""
    tokenizer, stream = processor.tokenizer, TextStream(processor.tokenizer)
    texts = [tokenizer.tokenizer.id_to_token(one) if one in tokenizer.ends else stream.push(one) for one in answer]
    return tuple(Token(*one) for one in zip(texts, answer, probabilities))


def _numbers(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
