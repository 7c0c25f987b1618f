"""Regular tiles become keys beside their tags."""

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
    """NVLM-H: keys are tags and tiles, each behind a norm of its own.

    `bind_tags`: each tile's tokens also get the mean embedding of their tag. Cross-attention has no order of its own,
    so a tag that merely stands beside a tile does not tell which tile it names. The norms bring word embeddings and
    projected tiles, which differ in scale by orders of magnitude in a real model, to one.
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
    """Row p of `x_PH` as often as `times_P` says, on the CPU: [N, H].

    Rows that are repeated equally often go together: their gradients are summed by one reduction, which in bf16 rounds
    once, where those of an index would be added up one by one.
    """
    parts, start = [], 0
    for times, run in groupby(times_P.tolist()):
        stop = start + sum(1 for _ in run)
        parts.append(x_PH[start:stop, None].expand(-1, times, -1).flatten(0, 1))
        start = stop
    return torch.cat(parts)
