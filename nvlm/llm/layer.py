"""The decoder layer of the language model, and its short way where nothing is learned.

Shapes: S columns, B rows, H model width, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from nvlm.llm.packing import Packing
from nvlm.parallel import seeded


class SeededLayer(TransformerLayer):
    """A decoder layer whose first weights depend on the seed and its `number` alone, not on the layout."""

    def __init__(self, config: TransformerConfig, submodules, seed: int, number: int, **kwargs) -> None:
        with seeded(seed, f"layer {number}"):
            super().__init__(config, submodules, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        packed_seq_params: Packing | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """(hidden states, context). The masks of a `packed_seq_params` take the others' place."""
        if packed_seq_params is not None:
            attention_mask, context_mask = packed_seq_params.columns, packed_seq_params.keys
        return super().forward(
            hidden_states, attention_mask, context, context_mask, packed_seq_params=packed_seq_params, **kwargs
        )


class DecoderLayer(SeededLayer):
    """Computes what Megatron's layer computes; in evaluation without gradients by a fifth of the calls.

    A token of a small model costs what Python costs: there the short way takes less than half the time.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """(hidden states, context), as Megatron's."""
        if learns(self):
            return super().forward(
                hidden_states, attention_mask, context, context_mask, rotary_pos_emb=rotary_pos_emb, **kwargs
            )
        x_SBH = hidden_states + self._attend(self.input_layernorm(hidden_states), attention_mask, rotary_pos_emb)
        if isinstance(self.pre_cross_attn_layernorm, nn.RMSNorm):
            x_SBH = x_SBH + self.cross_attention(self.pre_cross_attn_layernorm(x_SBH), context_mask, context)[0]
        gate, up = project(self.mlp.linear_fc1, self.pre_mlp_layernorm(x_SBH)).chunk(2, dim=-1)
        return x_SBH + project(self.mlp.linear_fc2, nn.functional.silu(gate) * up), context

    def _attend(self, x_SBH: Tensor, mask: Tensor, angles_SB1D: Tensor) -> Tensor:
        attention = self.self_attention
        groups, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        heads_SBGHD = project(attention.linear_qkv, x_SBH).unflatten(-1, (groups, -1, width))
        query_key, value_SBGD = heads_SBGHD[..., :-1, :], heads_SBGHD[..., -1, :]
        query_key = rotated(query_key, angles_SB1D[..., None, :])
        query_SBND = query_key[..., :-1, :].flatten(2, 3)
        attended = attention.core_attention(query_SBND, query_key[..., -1, :], value_SBGD, mask)
        return project(attention.linear_proj, attended)


def learns(module: nn.Module) -> bool:
    """Whether gradients may be asked of `module`; also in a recomputed layer's first pass, which has none."""
    return module.training or torch.is_grad_enabled()


def project(linear: nn.Module, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """What `linear` computes, with `weight` in place of its own; without Megatron's autograd functions where nothing
    is learned."""
    column, row = type(linear) is ColumnParallelLinear, type(linear) is RowParallelLinear  # adapted ones have more
    if learns(linear) or linear.sequence_parallel or not (column or row):
        return linear(x)[0] if weight is None else linear(x, weight)[0]
    out = nn.functional.linear(x, linear.weight if weight is None else weight, linear.bias)
    return reduce_from_tensor_model_parallel_region(out, linear.tp_group) if row and linear.tp_group.size() > 1 else out


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """`x` [..., D] turned by `angles`, which broadcast to it (rotary position embedding, halves not interleaved)."""
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos().to(x.dtype) + torch.cat((-second, first), dim=-1) * angles.sin().to(x.dtype)
