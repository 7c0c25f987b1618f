"""Gated cross-attention with grouped queries, tensor parallel (NVLM section 4.3; gate after Flamingo).

Megatron's CrossAttention refuses grouped queries and has no gate. The layer adds tanh(gate) * attention to its
residual; the gate starts at zero, so a new model computes exactly what its text model computes.

Shapes: S text tokens, X keys, B rows, H model width, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import dataclasses

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import init_method_normal
from torch import Tensor, nn

from nvlm.attention.cache import KeepsKeys
from nvlm.attention.kernel import View
from nvlm.llm.adapters import Linears
from nvlm.llm.layer import project


class GatedCrossAttention(MegatronModule, KeepsKeys):
    """tanh(gate) * Wo attention(Wq x, Wk keys, Wv keys): no bias, no rotary embedding, the language model's heads."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, pg_collection, init_std: float, linears: Linears, **_
    ) -> None:
        super().__init__(config=config)
        self.heads = config.num_attention_heads // pg_collection.tp.size()
        self.groups = config.num_query_groups // pg_collection.tp.size()
        self.head_dim = config.kv_channels
        width = config.num_attention_heads * config.kv_channels
        init = init_method_normal(init_std)
        # It may be new while others are loaded. Userbuffers are for the linears of Megatron's own layer.
        config = dataclasses.replace(config, perform_initialization=True, tp_comm_overlap=False)
        shared = dict(init_method=init, bias=False, is_expert=False, tp_group=pg_collection.tp)
        column = dict(gather_output=False, skip_bias_add=False, **shared)
        build_q = linears.normed("cross_attention.linear_q")
        self.linear_q = build_q(config.hidden_size, width, config=config, **column)
        # Every rank holds all keys; they are never split by sequence or context parallelism. So this rank's queries see
        # all of them, and the sum over ranks completes the gradient of the keys: `nvlm.arch.base` sums it once for all
        # layers. An adapter completes its part of that gradient itself, so with adapters each layer sums its own.
        whole = dataclasses.replace(
            config,
            sequence_parallel=False,
            context_parallel_size=1,
            hierarchical_context_parallel_sizes=None,
            cp_comm_type=None,
        )
        kv_width = 2 * config.num_query_groups * config.kv_channels
        build_kv = linears.column("cross_attention.linear_kv")
        self.linear_kv = build_kv(config.hidden_size, kv_width, config=whole, **column)
        if linears.peft is None:
            _leave_sum(self.linear_kv)
        build_proj = linears.row("cross_attention.linear_proj")
        self.linear_proj = build_proj(
            width,
            config.hidden_size,
            config=config,
            input_is_parallel=True,
            skip_bias_add=True,
            **shared,  # the gate, not a smaller initialisation, makes a new layer a no-op
        )
        self.gate = nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        self.gate.sequence_parallel = config.sequence_parallel

    def forward(
        self, hidden_SBH: Tensor, attention_mask: View, key_value_states: Tensor | None, **_
    ) -> tuple[Tensor, None]:
        """[S, B, H] to add to the residual.

        `attention_mask` says which keys are visible; `key_value_states` is [X, B, H], or None if a cache holds the keys
        and values.
        """
        query = project(self.linear_q, hidden_SBH)
        query_SBND = query.view(*query.shape[:2], self.heads, self.head_dim)
        attended = attention_mask.attend(query_SBND, *self._key_values(key_value_states))
        return torch.tanh(self.gate) * project(self.linear_proj, attended), None

    def _key_values(self, states_XBH: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values [X, B, G, D]."""
        if states_XBH is None:
            return self.cache.pair
        key_value = self.linear_kv(states_XBH)[0].unflatten(-1, (self.groups, 2, self.head_dim))
        pair = key_value.unbind(dim=-2)
        return pair if self.cache is None else self.cache.keep(*pair)


def _leave_sum(linear: nn.Module) -> None:
    """Let the column-parallel `linear` return only this tensor-parallel rank's part of its input's gradient."""
    if hasattr(linear, "parallel_mode"):
        linear.parallel_mode = None  # Transformer Engine: it has already split the weight
    else:
        linear.allreduce_dgrad, linear.disable_grad_reduce = False, True
