"""Core attention on torch's scaled_dot_product_attention, and rotary positions.

Megatron's local attention knows neither packed rows nor a query without keys. This one takes any boolean mask;
on CUDA, Transformer Engine's attention can take its place through the layer spec.

Shapes: S queries, X keys, B rows, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from nvlm.attention.cache import KeepsKeys
from nvlm.attention.packing import Runs, attend_blocks, attend_runs
from nvlm.config.values import LLMConfig


def attend(
    query_SBND: Tensor,
    key_XBGD: Tensor,
    value_XBGD: Tensor,
    mask: Tensor | BlockMask | Runs | None,
    scale: float | None,
) -> Tensor:
    """softmax(scale q k^T) v, [S, B, N * D]. `mask`: [B, 1, S, X], True where a query must not look, or blocks of what
    it looks at, or samples whose tokens look at those before; a query that sees no key gets exactly zero. `scale`: None
    for 1 / sqrt(D)."""
    columns, rows, heads, width = query_SBND.shape
    groups = key_XBGD.shape[2]
    if columns == 1 and (mask is None or isinstance(mask, Tensor)):
        # Of one column a group's heads stand as columns do: keys are read once a group, and a call costs half.
        query_BGnD = for_kernel(query_SBND).reshape(rows, groups, heads // groups, width)
        key_value = (for_kernel(x).permute(1, 2, 0, 3) for x in (key_XBGD, value_XBGD))
        seen = None if mask is None else ~mask
        out_BGnD = nn.functional.scaled_dot_product_attention(query_BGnD, *key_value, attn_mask=seen, scale=scale)
        return _blind(out_BGnD, mask).reshape(1, rows, heads * width).to(query_SBND.dtype)
    inputs = [for_kernel(x).permute(1, 2, 0, 3) for x in (query_SBND, key_XBGD, value_XBGD)]
    if isinstance(mask, BlockMask):
        out_BNSD = attend_blocks(*inputs, mask, scale)
    elif isinstance(mask, tuple):
        out_BNSD = attend_runs(*inputs, mask, scale)
    else:
        out_BNSD = nn.functional.scaled_dot_product_attention(
            *inputs,
            attn_mask=None if mask is None else ~mask,
            scale=scale,
            enable_gqa=heads != groups,
        )
        out_BNSD = _blind(out_BNSD, mask)
    return out_BNSD.permute(2, 0, 1, 3).flatten(2).to(query_SBND.dtype)


def _blind(out_BNSD: Tensor, mask: Tensor | None) -> Tensor:
    """`out_BNSD`, with zeros where a query sees no key: torch's kernels give those on CPU, on a GPU not all of them."""
    if mask is None or out_BNSD.device.type == "cpu":
        return out_BNSD
    return out_BNSD.masked_fill(mask.all(-1, keepdim=True), 0.0)


def for_kernel(x: Tensor) -> Tensor:
    """`x` in the precision that attention works in: torch's bf16 attention is several times slower on CPU."""
    return x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x


class CoreAttention(nn.Module, KeepsKeys):
    """Attention with grouped heads among the columns that this process holds, and those that a cache keeps."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError(f"CoreAttention: got context parallel size {config.context_parallel_size}, expected 1")
        self.softmax_scale = softmax_scale

    def forward(
        self, query_SBND, key_XBGD, value_XBGD, attention_mask: Tensor | BlockMask | Runs | None = None, **_
    ) -> Tensor:
        """[S, B, N * D]; `attention_mask` as `mask` of `attend`, over the keys of all columns."""
        if self.cache is not None:
            key_XBGD, value_XBGD = self.cache.append(for_kernel(key_XBGD), for_kernel(value_XBGD))
        return attend(query_SBND, key_XBGD, value_XBGD, attention_mask, self.softmax_scale)


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
