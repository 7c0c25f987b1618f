"""Core attention on torch's scaled_dot_product_attention, and the masks that it takes.

Megatron's local attention knows neither packed rows nor a query without keys. This one takes any boolean mask;
on CUDA, Transformer Engine's attention can take its place through the layer spec.

Shapes: S queries, X keys, B rows, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from nvlm.batch import ALL_TILES, PAD


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v with grouped heads; a query that sees no key gets exactly zero."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError(f"CoreAttention: got context parallel size {config.context_parallel_size}, expected 1")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_SBND: Tensor,
        key_XBGD: Tensor,
        value_XBGD: Tensor,
        attention_mask: Tensor | None = None,  # [B, 1, S, X], True where the query must not look
        **_,
    ) -> Tensor:
        """[S, B, N * D]."""
        inputs = [x.permute(1, 2, 0, 3) for x in (query_SBND, key_XBGD, value_XBGD)]
        if query_SBND.device.type == "cpu":
            inputs = [x.float() for x in inputs]  # torch's bf16 attention is several times slower there
        out_BNSD = nn.functional.scaled_dot_product_attention(
            *inputs,
            attn_mask=None if attention_mask is None else ~attention_mask,
            scale=self.softmax_scale,
            enable_gqa=query_SBND.shape[2] != key_XBGD.shape[2],
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2).to(query_SBND.dtype)


def causal_mask(sample_BS: Tensor) -> Tensor:
    """[B, 1, S, S], True where a token must not look: ahead, into another sample, or at padding."""
    length = sample_BS.shape[1]
    same = (sample_BS[:, :, None] == sample_BS[:, None, :]) & (sample_BS != PAD)[:, None, :]
    behind = torch.ones(length, length, dtype=torch.bool, device=sample_BS.device).tril()
    return ~(same & behind)[:, None]


def visible(
    sample_q: Tensor, image_q: Tensor, tile_q: Tensor, sample_k: Tensor, image_k: Tensor, tile_k: Tensor
) -> Tensor:
    """Who sees what: [..., S, X], from the numbers [..., S] of queries and [..., X] of keys.

    A query sees the keys of its own sample's images up to the last one begun; a query bound to a tile (a tile tag
    of NVLM-X, section 4.3) sees that tile of that image alone.
    """
    sample_q, image_q, tile_q = sample_q[..., :, None], image_q[..., :, None], tile_q[..., :, None]
    sample_k, image_k, tile_k = sample_k[..., None, :], image_k[..., None, :], tile_k[..., None, :]
    before = (sample_q == sample_k) & (sample_k != PAD) & (image_k <= image_q)
    own = (image_k == image_q) & (tile_k == tile_q)
    return before & ((tile_q == ALL_TILES) | own)


def rotary_angles(positions_BS: Tensor, head_dim: int, theta: float) -> Tensor:
    """[S, B, 1, D] rotary angles in radians, from each token's position within its own sample."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    angles = positions_BS.t().float()[..., None] * theta**-steps
    return torch.cat((angles, angles), dim=-1)[:, :, None, :]
