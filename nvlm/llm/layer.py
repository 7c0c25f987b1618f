"""The decoder layers of the language model, and their fast path for inference.

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
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from nvlm.attention.kernel import Masks, View
from nvlm.processes.groups import seeded


class ColumnAttention(SelfAttention):
    """Megatron's self-attention, without the `packed_seq_params` that bring the layer its views.

    Megatron would take rows for packed ones, and split queries, keys and values apart from their rotary embedding.
    """

    def forward(self, hidden_states: Tensor, attention_mask: View, *, packed_seq_params: Masks | None = None, **kwargs):
        """Like the base class."""
        return super().forward(hidden_states, attention_mask, **kwargs)


class SeededLayer(TransformerLayer):
    """A decoder layer whose initial weights depend only on the seed and its `number`, not on the layout."""

    def __init__(self, config: TransformerConfig, submodules, seed: int, number: int, **kwargs) -> None:
        with seeded(seed, f"layer {number}"):
            super().__init__(config, submodules, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        packed_seq_params: Masks | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """(hidden states, context). Views come in `packed_seq_params`, so that they also reach recomputed layers."""
        columns, keys = packed_seq_params.columns, packed_seq_params.keys
        return super().forward(hidden_states, columns, context, keys, packed_seq_params=packed_seq_params, **kwargs)


class DecoderLayer(SeededLayer):
    """Megatron's layer, plus `evaluated`: the same computation without gradients, with a fifth of the Python calls.

    Small models are bound by Python overhead: for them the fast path takes less than half the time.
    """

    def evaluated(
        self,
        x_SBH: Tensor,
        columns: View,
        context: Tensor | None,
        keys: View | None,
        rotation: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The layer's output [S, B, H]; `columns` and `keys` as in `Masks`, `rotation` from `rotation_of`."""
        x_SBH = x_SBH + self._attend(self.input_layernorm(x_SBH), columns, rotation)
        if isinstance(self.pre_cross_attn_layernorm, nn.RMSNorm):
            x_SBH = x_SBH + self.cross_attention(self.pre_cross_attn_layernorm(x_SBH), keys, context)[0]
        gate, up = project(self.mlp.linear_fc1, self.pre_mlp_layernorm(x_SBH)).chunk(2, dim=-1)
        return x_SBH + project(self.mlp.linear_fc2, nn.functional.silu(gate) * up)

    def _attend(self, x_SBH: Tensor, columns: View, rotation: tuple[Tensor, Tensor]) -> Tensor:
        attention = self.self_attention
        groups, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        heads = project(attention.linear_qkv, x_SBH)
        heads_SBGHD = heads.view(*heads.shape[:2], groups, -1, width)
        queries = heads_SBGHD.shape[3] - 2  # per group, followed by one key and one value
        query_key = rotated(_normed(attention, heads_SBGHD.narrow(3, 0, queries + 1)), *rotation)
        query_SBND = query_key.narrow(3, 0, queries).flatten(2, 3)
        key_SBGD, value_SBGD = query_key.select(3, queries), heads_SBGHD.select(3, queries + 1)
        attended = attention.core_attention(query_SBND, key_SBGD, value_SBGD, columns)
        return project(attention.linear_proj, attended)


class DecoderBlock(TransformerBlock):
    """The layers of a pipeline stage; they use the fast path for inference, and userbuffers only for training."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.overlaps = _overlaps(self)

    def train(self, mode: bool = True) -> DecoderBlock:
        """Like the base class."""
        for linear, name in self.overlaps:
            setattr(linear, name, mode)
        return super().train(mode)

    def forward(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Masks | None = None,
    ) -> Tensor:
        """Hidden states [S, B, H] after the last layer and, if this stage has it, the final norm."""
        if learns(self) or not all(isinstance(layer, DecoderLayer) for layer in self.layers):
            return super().forward(
                hidden_states,
                attention_mask,
                context,
                context_mask,
                rotary_pos_emb,
                packed_seq_params=packed_seq_params,
            )
        x_SBH = hidden_states if self.pre_process else self.input_tensor
        rotation = rotation_of(rotary_pos_emb, x_SBH.dtype)
        for layer in self.layers:
            x_SBH = layer.evaluated(x_SBH, packed_seq_params.columns, context, packed_seq_params.keys, rotation)
        return x_SBH if self.final_layernorm is None else self.final_layernorm(x_SBH)


def _overlaps(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The linears in `module` that use userbuffers, with the names of the settings that say so."""
    settings = [(one, name, value) for one in module.modules() for name, value in vars(one).items()]
    return [(one, name) for one, name, value in settings if name.startswith("ub_") and value is True]


def learns(module: nn.Module) -> bool:
    """Whether `module` may need gradients; also true in a recomputed layer's first pass, which runs without them."""
    return module.training or torch.is_grad_enabled()


def project(linear: nn.Module, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """The output of `linear`, with `weight` instead of its own if given; skips Megatron's autograd functions for
    inference."""
    column, row = type(linear) is ColumnParallelLinear, type(linear) is RowParallelLinear  # not linears with adapters
    if learns(linear) or linear.sequence_parallel or not (column or row):
        return linear(x)[0] if weight is None else linear(x, weight)[0]
    out = nn.functional.linear(x, linear.weight if weight is None else weight, linear.bias)
    return reduce_from_tensor_model_parallel_region(out, linear.tp_group) if row and linear.tp_group.size() > 1 else out


def _normed(attention: SelfAttention, query_key_SBGHD: Tensor) -> Tensor:
    """Each group's queries and, last, its key, after the norms that a model like Qwen3 has for each head."""
    if attention.q_layernorm is None:
        return query_key_SBGHD
    query, key = query_key_SBGHD.split((query_key_SBGHD.shape[3] - 1, 1), dim=3)
    return torch.cat((attention.q_layernorm(query), attention.k_layernorm(key)), dim=3)


def rotation_of(angles_SB1D: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, B, 1, 1, D] for `rotated`; the sines of the first half are negated."""
    angles = angles_SB1D.unsqueeze(3)
    first, second = angles.sin().to(dtype).chunk(2, dim=-1)
    return angles.cos().to(dtype), torch.cat((-first, second), dim=-1)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`x` [..., D] with the rotary position embedding applied (halves, not interleaved)."""
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)
