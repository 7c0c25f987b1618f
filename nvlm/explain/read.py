"""What the columns of an answer read in one gated layer, computed again from the layer's input, in fp32.

Shapes: S columns, B = 1 row, N answer tokens, X keys, T tiles, h query heads of this tensor-parallel rank, G key-value
heads, D head width, W = h * D, H model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nvlm.explain.watch import Gated
from nvlm.llm.layer import project


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that predict an answer, and what they may read."""

    columns_N: Tensor
    visible_NX: Tensor
    tile_XT: Tensor  # 1 where a key belongs to a tile, as its tokens and its tag do
    words_XT: Tensor  # the same for tags alone


@dataclass(frozen=True, slots=True)
class Read:
    """The numbers of `nvlm.explain.looks.Looks` for one layer, each [N, T]."""

    attention: Tensor
    tags: Tensor
    strength: Tensor


def read(layer: Gated, keys_XBH: Tensor, asked: Columns) -> Read:
    """What `layer` read at the columns `asked`. A collective call of the tensor-parallel ranks."""
    key_hXD, value_hXD = _keys_and_values(layer, keys_XBH)
    attention = layer.attention
    query_hND = project(attention.linear_q, layer.query_SBH)[asked.columns_N, 0].float()
    query_hND = query_hND.unflatten(-1, (attention.heads, attention.head_dim)).transpose(0, 1)
    scores_hNX = query_hND @ key_hXD.transpose(1, 2) / attention.head_dim**0.5
    # A token that sees no key reads nothing.
    probabilities_hNX = scores_hNX.masked_fill(~asked.visible_NX, -torch.inf).softmax(-1).nan_to_num(0.0)
    return Read(
        _mean_over_heads(probabilities_hNX @ asked.tile_XT),
        _mean_over_heads(probabilities_hNX @ asked.words_XT),
        _strength(layer, probabilities_hNX, value_hXD, asked),
    )


def _keys_and_values(layer: Gated, keys_XBH: Tensor) -> tuple[Tensor, Tensor]:
    """[h, X, D] each, repeated for the query heads that share them."""
    attention = layer.attention
    pair_XG2D = attention.linear_kv(keys_XBH)[0][:, 0].float().unflatten(-1, (attention.groups, 2, attention.head_dim))
    repeats = attention.heads // attention.groups
    key_hXD, value_hXD = (x_XGD.transpose(0, 1).repeat_interleave(repeats, 0) for x_XGD in pair_XG2D.unbind(-2))
    return key_hXD, value_hXD


def _strength(layer: Gated, probabilities_hNX: Tensor, value_hXD: Tensor, asked: Columns) -> Tensor:
    """[N, T]. The output projection is linear, so that what the tiles add sums to the layer's output."""
    parts_TNW = torch.stack(
        [((probabilities_hNX * own_X) @ value_hXD).transpose(0, 1).flatten(1) for own_X in asked.tile_XT.T]
    )
    added_TNH = project(layer.attention.linear_proj, parts_TNW.to(layer.residual_SBH.dtype)).float()
    before_N = layer.residual_SBH[asked.columns_N, 0].float().norm(dim=-1)
    return layer.attention.gate.float().tanh().abs() * added_TNH.norm(dim=-1).T / before_N[:, None]


def _mean_over_heads(values_hNT: Tensor) -> Tensor:
    """[N, T], over the heads of all tensor-parallel ranks, which have equal numbers."""
    mean_NT = values_hNT.mean(0)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        dist.all_reduce(mean_NT, group=group)
    return mean_NT / group.size()
