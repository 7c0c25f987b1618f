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


class TaggedTileKeys(TileKeys):
    """NVLM-H: keys are tags and tiles, each kind with its own norm.

    `bind_tags`: the mean embedding of a tile's tag is added to each of the tile's tokens. Cross-attention is
    order-invariant, so a tag next to a tile does not show which tile it names. The norms bring word embeddings and
    projected tiles, which differ by orders of magnitude in a real model, to the same scale.
    """

    def __init__(self, config: TransformerConfig, bind_tags: bool) -> None:
        super().__init__(config)
        self.tag_norm = key_norm(config)
        self.bind_tags = bind_tags

    def forward(self, batch: Batch, project: Callable[[Tensor], Tensor], embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Keys [X, B, H]."""
        words_BXH = self.tag_norm(embed(batch.cross_tokens))
        tiles_NH = self.tile_norm(picture_tokens(batch, batch.cross_rows, project))
        if self.bind_tags and batch.cross_tags.numel():
            real_PL1 = (batch.cross_tags != PAD)[..., None]
            mean_PH = (embed(batch.cross_tags) * real_PL1).sum(1) / real_PL1.sum(1).clamp(min=1)
            tiles_NH = tiles_NH + _repeated(self.tag_norm(mean_PH), batch.cross_lengths)
        return place(words_BXH, tiles_NH, batch)


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
