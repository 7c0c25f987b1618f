"""FlexAttention, for training on a GPU: blocks of 128 x 128 pairs that are masked entirely cost nothing.

Shapes: S queries, X keys, B rows, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nvlm.attention.kernel import PairKernel, View
from nvlm.attention.visibility import follows, sees
from nvlm.config.values import Config
from nvlm.data.batch import Batch


class Flex(PairKernel):
    """Its mask is a BlockMask of the visible pairs."""

    def among(self, batch: Batch, queries_S: Tensor, keys_X: Tensor) -> View:
        """A block mask of columns x columns."""
        sample_q, sample_k = batch.sample[:, queries_S], batch.sample[:, keys_X]

        def rule(row, head, query, key):
            return follows(sample_q[row, query], queries_S[query], sample_k[row, key], keys_X[key])

        return View(self, _blocks(rule, sample_q, len(keys_X)))

    def keys(self, batch: Batch, columns_S: Tensor) -> View:
        """A block mask of columns x keys."""
        sample_q, image_q, tile_q = (numbers[:, columns_S] for numbers in (batch.sample, batch.image, batch.tile))
        sample_k, image_k, tile_k = batch.cross_sample, batch.cross_image, batch.cross_tile

        def rule(row, head, query, key):
            queries = (numbers[row, query] for numbers in (sample_q, image_q, tile_q))
            return sees(*queries, *(numbers[row, key] for numbers in (sample_k, image_k, tile_k)))

        return View(self, _blocks(rule, sample_q, sample_k.shape[1]))

    def attended(
        self, query_BNSD: Tensor, key_BGXD: Tensor, value_BGXD: Tensor, mask: BlockMask, scale: float | None
    ) -> Tensor:
        """[B, N, S, D]."""
        return attend_blocks(query_BNSD, key_BGXD, value_BGXD, mask, scale)


def attend_blocks(query_BNSD: Tensor, key_BGXD: Tensor, value_BGXD: Tensor, seen: BlockMask, scale: float | None):
    """softmax(scale q k^T) v under the block mask `seen`, [B, N, S, D]; zero for a query that sees no key."""
    grouped = query_BNSD.shape[1] != key_BGXD.shape[1]
    attend = _compiled(flex_attention) if query_BNSD.is_cuda else flex_attention
    return attend(query_BNSD, key_BGXD, value_BGXD, block_mask=seen, scale=scale, enable_gqa=grouped)


def _blocks(rule: Callable, like_BS: Tensor, keys: int) -> BlockMask:
    make = _compiled(create_block_mask) if like_BS.is_cuda else create_block_mask
    rows, queries = like_BS.shape
    return make(rule, rows, None, queries, keys, device=like_BS.device)


@functools.cache
def _compiled(function: Callable) -> Callable:
    # Uncompiled, both functions materialise the whole mask. Row lengths vary, so shapes are dynamic: one kernel serves
    # all lengths. Self- and cross-attention, with and without gradients, one row and several still compile separately,
    # and beyond the limit (8 by default) torch silently runs uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(function, dynamic=True)


def build(config: Config) -> Flex:
    """The same kernel for every model."""
    return Flex()
