"""torch's scaled_dot_product_attention under a dense mask: any shape, on any device, with or without a cache.

Shapes: S queries, X keys, B rows, N query heads, G key-value heads, n query heads of a group, D head width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nvlm.attention.kernel import CoreAttention, PairKernel, View
from nvlm.attention.precision import for_kernel
from nvlm.attention.visibility import causal_mask, unseen_keys
from nvlm.config.values import Config
from nvlm.data.batch import Batch


class Dense(PairKernel):
    """Its mask is [B, 1, S, X], True where attention is forbidden; None: every query sees every key."""

    def among(self, batch: Batch, queries_S: Tensor, keys_X: Tensor) -> View:
        """A dense mask of columns x columns."""
        return View(self, causal_mask(batch.sample, queries_S, keys_X))

    def keys(self, batch: Batch, columns_S: Tensor) -> View:
        """A dense mask of columns x keys."""
        return View(self, unseen_keys(batch, columns_S))

    def attend(
        self,
        query_SBND: Tensor,
        key_XBGD: Tensor,
        value_XBGD: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        core: nn.Module | None = None,
    ) -> Tensor:
        """[S, B, N * D]."""
        columns, rows, heads, width = query_SBND.shape
        if columns != 1:
            return super().attend(query_SBND, key_XBGD, value_XBGD, mask, scale)
        # With one column, a group's heads take the place of columns: keys are read once per group, at half the cost.
        groups = key_XBGD.shape[2]
        query_BGnD = for_kernel(query_SBND).reshape(rows, groups, heads // groups, width)
        key_BGXD, value_BGXD = for_kernel(key_XBGD).permute(1, 2, 0, 3), for_kernel(value_XBGD).permute(1, 2, 0, 3)
        seen = None if mask is None else ~mask
        out_BGnD = scaled_dot_product_attention(query_BGnD, key_BGXD, value_BGXD, attn_mask=seen, scale=scale)
        return _blind(out_BGnD, mask).reshape(1, rows, heads * width).to(query_SBND.dtype)

    def attended(
        self, query_BNSD: Tensor, key_BGXD: Tensor, value_BGXD: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """[B, N, S, D]."""
        seen, grouped = None if mask is None else ~mask, query_BNSD.shape[1] != key_BGXD.shape[1]
        out_BNSD = scaled_dot_product_attention(
            query_BNSD, key_BGXD, value_BGXD, attn_mask=seen, scale=scale, enable_gqa=grouped
        )
        return _blind(out_BNSD, mask)


def _blind(out_BNSD: Tensor, mask: Tensor | None) -> Tensor:
    """`out_BNSD`, with zeros for queries that see no key: on a GPU, some of torch's kernels return something else."""
    if mask is None or out_BNSD.device.type == "cpu":
        return out_BNSD
    return out_BNSD.masked_fill(mask.all(-1, keepdim=True), 0.0)


DENSE = Dense()
ALL = View(DENSE, None)


class WholeAttention(CoreAttention):
    """Core attention in which every column sees every other."""

    def forward(
        self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, attention_mask: None = None, **_
    ) -> Tensor:
        """[S, B, N * D]."""
        return super().forward(query_SBND, key_SBGD, value_SBGD, ALL)


def build(config: Config) -> Dense:
    """The same kernel for every model."""
    return DENSE
