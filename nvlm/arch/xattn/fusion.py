"""Projected tiles become the keys of gated cross-attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from nvlm.batch import IMAGE, PAD, Batch
from nvlm.llm.attention import visible
from nvlm.llm.norm import RMSNorm


def unseen_keys(batch: Batch) -> Tensor:
    """[B, 1, S, X], True where a text-stream token must not look at a key."""
    seen = visible(batch.sample, batch.image, batch.tile, batch.cross_sample, batch.cross_image, batch.cross_tile)
    return ~seen[:, None]


def _norm(config: TransformerConfig) -> RMSNorm:
    # Keys are whole on every rank, so their norms' gradients are too: nothing to sum under sequence parallelism.
    whole = dataclasses.replace(config, sequence_parallel=False) if config.sequence_parallel else config
    return RMSNorm(whole, config.hidden_size, config.layernorm_epsilon)


class CrossFusion(nn.Module):
    """NVLM-X: the stream is text alone, all tiles are keys, behind an RMSNorm of their own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.tile_norm = _norm(config)

    def stream(self, words_BSH: Tensor, batch: Batch, tiles_TKH: Tensor) -> Tensor:
        return words_BSH

    def keys(self, batch: Batch, tiles_TKH: Tensor, embed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        words_BXH = embed(batch.cross_tokens)
        tiles = self.tile_norm(tiles_TKH[batch.cross_tiles])
        return place(words_BXH, tiles, batch), unseen_keys(batch)


class TaggedFusion(CrossFusion):
    """Keys are tags and tiles, each behind a norm of its own.

    `bind_tags`: each tile's tokens also get the mean embedding of their tag. Cross-attention has no order of its own,
    so a tag that merely stands beside a tile does not tell which tile it names. The norms bring word embeddings and
    projected tiles, which differ in scale by orders of magnitude in a real model, to one.
    """

    def __init__(self, config: TransformerConfig, bind_tags: bool) -> None:
        super().__init__(config)
        self.tag_norm = _norm(config)
        self.bind_tags = bind_tags

    def keys(self, batch: Batch, tiles_TKH: Tensor, embed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        words_BXH = self.tag_norm(embed(batch.cross_tokens))
        tiles = self.tile_norm(tiles_TKH[batch.cross_tiles])
        if self.bind_tags and batch.cross_tags.numel():
            real_TL1 = (batch.cross_tags != PAD)[..., None]
            mean_TH = (embed(batch.cross_tags) * real_TL1).sum(1) / real_TL1.sum(1).clamp(min=1)
            tiles = tiles + self.tag_norm(mean_TH)[:, None, :]
        return place(words_BXH, tiles, batch), unseen_keys(batch)


def place(words_BXH: Tensor, tiles_TKH: Tensor, batch: Batch) -> Tensor:
    """Keys [X, B, H]: `tiles_TKH` in the IMAGE places of `batch.cross_tokens`, words elsewhere."""
    places = (batch.cross_tokens == IMAGE)[..., None]
    return words_BXH.masked_scatter(places, tiles_TKH.to(words_BXH.dtype)).transpose(0, 1).contiguous()
