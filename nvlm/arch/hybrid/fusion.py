"""Turns regular tiles and their tags into keys."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from nvlm.arch.pictures import picture_tokens
from nvlm.arch.xattn.fusion import TileKeys, key_norm, place
from nvlm.data.batch import PAD, Batch

_BASE = 10.0  # of the rotation of a tag's words


class TaggedTileKeys(TileKeys):
    """NVLM-H: keys are tags and tiles, each kind with its own norm.

    `bind_tags`: what is added to each of a tile's tokens, because cross-attention has no order, so that a tag next to a
    tile does not show which tile it names. With "ordered" it is the mean of the embeddings of the tag's words, each
    first rotated by its position in the tag (`rotated`); a plain sum would be the same vector for <tile_x0_y1> and
    <tile_x1_y0>. "mean" is that plain mean, and "none" adds nothing.

    The norms bring word embeddings and projected tiles to the same scale; in a real model they differ by orders of
    magnitude.
    """

    def __init__(self, config: TransformerConfig, bind_tags: str) -> None:
        super().__init__(config)
        self.tag_norm = key_norm(config)
        self.bind_tags = bind_tags

    def forward(self, batch: Batch, project: Callable[[Tensor], Tensor], embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Keys [X, B, H]."""
        words_BXH = self.tag_norm(embed(batch.cross_tokens))
        tiles_NH = self.tile_norm(picture_tokens(batch, batch.cross_rows, project))
        if self.bind_tags != "none" and batch.cross_tags.numel():
            real_PL1 = (batch.cross_tags != PAD)[..., None]
            tags_PLH = embed(batch.cross_tags)
            if self.bind_tags == "ordered":
                tags_PLH = rotated(tags_PLH)
            mean_PH = (tags_PLH * real_PL1).sum(1) / real_PL1.sum(1).clamp(min=1)
            tiles_NH = tiles_NH + _repeated(self.tag_norm(mean_PH), batch.cross_lengths)
        return place(words_BXH, tiles_NH, batch)


def rotated(x_PLH: Tensor) -> Tensor:
    """The words of tags, each rotated by its position l = 0, 1, ...; lengths do not change.

    Channel h is paired with channel h + H/2, and the pair is turned by l * 10^(-2h/H) radians, as rotary embeddings
    turn queries and keys (Su et al. 2021, in the order of channels that Llama uses). The base is 10 because tags have
    3 to 25 words: a period of 6 to 63 words tells their positions apart, and a longer one hardly turns them.
    """
    _, length, width = x_PLH.shape
    steps_F = torch.arange(0, width, 2, dtype=torch.float32, device=x_PLH.device) / width
    angles_LF = torch.arange(length, device=x_PLH.device)[:, None] * _BASE**-steps_F
    cos_LF, sin_LF = angles_LF.cos().to(x_PLH.dtype), angles_LF.sin().to(x_PLH.dtype)
    a_PLF, b_PLF = x_PLH.chunk(2, dim=-1)
    return torch.cat([a_PLF * cos_LF - b_PLF * sin_LF, b_PLF * cos_LF + a_PLF * sin_LF], dim=-1)


def _repeated(x_PH: Tensor, times_P: Tensor) -> Tensor:
    """Row p of `x_PH` repeated `times_P[p]` times: [N, H]. `times_P` is on the CPU.

    Rows with equal counts are expanded together, so that their gradients are summed in one reduction, which rounds once
    in bf16; the gradients of indexing would be added one by one.
    """
    parts, start = [], 0
    for times, run in groupby(times_P.tolist()):
        stop = start + sum(1 for _ in run)
        parts.append(x_PH[start:stop, None].expand(-1, times, -1).flatten(0, 1))
        start = stop
    return torch.cat(parts)
