"""Projected tiles become the keys of gated cross-attention."""

from __future__ import annotations

from torch import Tensor

from nvlm.batch import IMAGE, PAD, Batch
from nvlm.llm.attention import visible


def unseen_keys(batch: Batch) -> Tensor:
    """[B, 1, S, X], True where a text-stream token must not look at a key."""
    seen = visible(
        batch.sample, batch.image, batch.tile, batch.cross_sample, batch.cross_image, batch.cross_tile
    )
    return ~seen[:, None]


def keys(batch: Batch, tiles_TKH: Tensor, embed, bind_tags: bool = False) -> tuple[Tensor, Tensor]:
    """Keys [X, B, H] and their mask: word embeddings of tags, and the tokens of `batch.cross_tiles`.

    `bind_tags`: each tile token also gets the mean embedding of its tile's tag. Cross-attention has no order of
    its own, so a tag that merely stands beside a tile does not tell which tile it names.
    """
    words_BXH = embed(batch.cross_tokens)
    chosen_TKH = tiles_TKH[batch.cross_tiles].to(words_BXH.dtype)
    if bind_tags and batch.cross_tags.numel():
        real_TL1 = (batch.cross_tags != PAD)[..., None]
        tag_TH = (embed(batch.cross_tags) * real_TL1).sum(1) / real_TL1.sum(1).clamp(min=1)
        chosen_TKH = chosen_TKH + tag_TH[:, None, :]
    filled = words_BXH.masked_scatter((batch.cross_tokens == IMAGE)[..., None], chosen_TKH)
    return filled.transpose(0, 1).contiguous(), unseen_keys(batch)


class CrossFusion:
    """NVLM-X: the stream is text alone, all tiles are keys."""

    def stream(self, words_BSH: Tensor, batch: Batch, tiles_TKH: Tensor) -> Tensor:
        return words_BSH

    def keys(self, batch: Batch, tiles_TKH: Tensor, embed) -> tuple[Tensor, Tensor]:
        return keys(batch, tiles_TKH, embed)
