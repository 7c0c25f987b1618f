"""Transformer Engine's attention for packed rows. Imported only where Transformer Engine is chosen (nvlm.llm.backend).

Shapes: S columns, X keys, B rows, T = S x B tokens, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from nvlm.attention.cache import KeepsKeys
from nvlm.attention.core import attend, for_kernel
from nvlm.attention.packing import Packing


class PackedAttention(TEDotProductAttention, KeepsKeys):
    """Learning: cuDNN's or flash attention among the samples of one line. Else as `CoreAttention`: keys are kept, and
    masks are dense."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: Packing | None = None,
        **kwargs,
    ) -> Tensor:
        """[S, B, N * D] from [S, B, N, D] and [X, B, G, D]; [T, 1, N * D] from a line [T, 1, N, D]."""
        if packed_seq_params is None:
            if self.cache is not None:
                key, value = self.cache.append(for_kernel(key), for_kernel(value))
            return attend(query, key, value, attention_mask, None)
        line = (x.squeeze(1) for x in (query, key, value))
        samples, causal = packed_seq_params.samples, AttnMaskType.padding_causal
        return super().forward(*line, None, causal, packed_seq_params=samples).flatten(1).unsqueeze(1)
