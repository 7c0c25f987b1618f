"""Turns projected tiles into the keys of gated cross-attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from nvlm.arch.pictures import picture_tokens
from nvlm.data.batch import IMAGE, Batch
from nvlm.llm.norm import RMSNorm
from nvlm.processes.device import to_device


def key_norm(config: TransformerConfig) -> RMSNorm:
    """The norm of one kind of keys."""
    # Every rank holds all keys, so the norms' gradients are complete: nothing to sum under sequence parallelism.
    whole = dataclasses.replace(config, sequence_parallel=False) if config.sequence_parallel else config
    return RMSNorm(whole, config.hidden_size, config.layernorm_epsilon)


class TileKeys(nn.Module):
    """NVLM-X: all tiles are keys, after an RMSNorm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.tile_norm = key_norm(config)

    def forward(self, batch: Batch, project: Callable[[Tensor], Tensor], embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Keys [X, B, H]."""
        tiles_NH = self.tile_norm(picture_tokens(batch, batch.cross_rows, project))
        padding_BXH = tiles_NH.new_zeros(*batch.cross_tokens.shape, tiles_NH.shape[-1])
        return place(padding_BXH, tiles_NH, batch)


def place(words_BXH: Tensor, tiles_NH: Tensor, batch: Batch) -> Tensor:
    """Keys [X, B, H]: `tiles_NH` at the IMAGE positions of `batch.cross_tokens`, words elsewhere."""
    places_N = (batch.on_host.cross_tokens == IMAGE).flatten().nonzero()[:, 0]
    places_N = to_device(places_N, words_BXH.device)
    tiles_NH = tiles_NH.to(words_BXH.dtype)
    return words_BXH.flatten(0, 1).index_put((places_N,), tiles_NH).view_as(words_BXH).transpose(0, 1).contiguous()
