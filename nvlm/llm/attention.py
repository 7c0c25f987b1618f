"""Core attention on torch's scaled_dot_product_attention, and the masks that it takes.

Megatron's local attention knows neither packed rows nor a query without keys. This one takes any boolean mask;
on CUDA, Transformer Engine's attention can take its place through the layer spec.

Shapes: S queries, X keys, B rows, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from nvlm.batch import ALL_TILES, PAD, Batch
from nvlm.config import LLMConfig
from nvlm.llm.cache import KeepsKeys


def attend(query_SBND: Tensor, key_XBGD: Tensor, value_XBGD: Tensor, unseen: Tensor | None, scale: float | None):
    """softmax(scale q k^T) v, [S, B, N * D]. `unseen` [B, 1, S, X] is True where a query must not look; one that
    sees no key gets exactly zero. `scale`: None for 1 / sqrt(D)."""
    inputs = [for_kernel(x).permute(1, 2, 0, 3) for x in (query_SBND, key_XBGD, value_XBGD)]
    out_BNSD = nn.functional.scaled_dot_product_attention(
        *inputs,
        attn_mask=None if unseen is None else ~unseen,
        scale=scale,
        enable_gqa=query_SBND.shape[2] != key_XBGD.shape[2],
    )
    return out_BNSD.permute(2, 0, 1, 3).flatten(2).to(query_SBND.dtype)


def for_kernel(x: Tensor) -> Tensor:
    """`x` in the precision that attention works in: torch's bf16 attention is several times slower on CPU."""
    return x.float() if x.device.type == "cpu" else x


class CoreAttention(nn.Module, KeepsKeys):
    """Attention with grouped heads among the columns that this process holds, and those that a cache keeps."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError(f"CoreAttention: got context parallel size {config.context_parallel_size}, expected 1")
        self.softmax_scale = softmax_scale

    def forward(self, query_SBND, key_XBGD, value_XBGD, attention_mask: Tensor | None = None, **_) -> Tensor:
        """[S, B, N * D]; `attention_mask` as `unseen` of `attend`, over the keys of all columns."""
        if self.cache is not None:
            key_XBGD, value_XBGD = self.cache.append(for_kernel(key_XBGD), for_kernel(value_XBGD))
        return attend(query_SBND, key_XBGD, value_XBGD, attention_mask, self.softmax_scale)


def causal_mask(sample_BL: Tensor, queries_S: Tensor, keys_X: Tensor) -> Tensor:
    """[B, 1, S, X], True where a token must not look: ahead, into another sample, or at padding.

    `sample_BL` are whole rows; `queries_S` and `keys_X` the columns of them that look and are looked at.
    """
    sample_q, sample_k = sample_BL[:, queries_S, None], sample_BL[:, None, keys_X]
    behind_SX = keys_X <= queries_S[:, None]
    return ~((sample_q == sample_k) & (sample_k != PAD) & behind_SX)[:, None]


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


def unseen_keys(batch: Batch, columns_S: Tensor) -> Tensor:
    """[B, 1, S, X], True where a token in one of the columns `columns_S` must not look at a key."""
    queries = (numbers[:, columns_S] for numbers in (batch.sample, batch.image, batch.tile))
    return ~visible(*queries, batch.cross_sample, batch.cross_image, batch.cross_tile)[:, None]


def rotary_frequencies(llm: LLMConfig) -> Tensor:
    """[D / 2] rotary frequencies in radians a position."""
    steps = torch.arange(0, llm.head_dim, 2, dtype=torch.float32, device="cpu") / llm.head_dim
    frequencies = llm.rope_theta**-steps
    return frequencies if llm.rope_scaling is None else scaled(frequencies, **llm.rope_scaling)


def rotary_angles(positions_BS: Tensor, frequencies: Tensor) -> Tensor:
    """[S, B, 1, D] rotary angles in radians, from each token's position within its own sample."""
    angles = positions_BS.t()[..., None] * frequencies
    return torch.cat((angles, angles), dim=-1)[:, :, None, :]


def scaled(
    frequencies: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> Tensor:
    """Llama 3.1's longer context: slow rotations slowed by `factor`, fast ones kept, a ramp between."""
    turns = original_max_position_embeddings * frequencies / (2 * torch.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)
