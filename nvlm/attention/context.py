"""Context parallelism: a row's columns over several ranks, self-attention over all of them.

The attention is two-dimensional (LongVILA, section 3.3): inside, all-to-all trades columns for heads; outside, keys
and values are gathered from the other ranks, which is what a ring of transfers computes.

Columns lie in zigzag: of 2 P equal chunks of a row, rank p of P has chunks p and 2 P - 1 - p, so that under a causal
mask all ranks have the same work.

Shapes: S columns of this rank, B rows, N heads, D head width, A ranks of the all-to-all.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from nvlm.attention.core import attend


def zigzag(length: int, rank: int, size: int) -> Tensor:
    """Columns [length / size] of `rank`; raises ValueError where 2 x size does not divide `length`."""
    if size == 1:
        return torch.arange(length)
    chunk, rest = divmod(length, 2 * size)
    if rest:
        raise ValueError(f"row length: got {length} columns, expected a multiple of 2 x {size} context-parallel ranks")
    starts = (rank * chunk, (2 * size - 1 - rank) * chunk)
    return torch.cat([torch.arange(start, start + chunk) for start in starts])


def own_columns(length: int) -> Tensor:
    """The columns of a row that this process computes."""
    return zigzag(length, parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size())


def all_columns(length: int) -> Tensor:
    """All columns of a row in the order in which the ranks hold them."""
    size = parallel_state.get_context_parallel_world_size()
    return torch.cat([zigzag(length, rank, size) for rank in range(size)])


def attended_columns(length: int, inner: int) -> tuple[Tensor, Tensor]:
    """Columns of the queries and of the keys that self-attention works on, with `inner` ranks in the all-to-all."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    first = rank // inner * inner
    queries = [zigzag(length, member, size) for member in range(first, first + inner)]
    return torch.cat(queries), all_columns(length)


def gather_columns(hidden_SBH: Tensor) -> Tensor:
    """Hidden states of all columns, in their order in the row. Gradients do not flow back."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return hidden_SBH.detach()
    whole = tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH.detach(), group=group)
    return whole[all_columns(len(whole)).argsort().to(whole.device)]


class ContextAttention(nn.Module):
    """Attention with grouped heads among columns that are spread over the context-parallel ranks."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_) -> None:
        super().__init__()
        sizes = config.hierarchical_context_parallel_sizes
        if not sizes or sizes[0] * sizes[1] != config.context_parallel_size:
            # Megatron-Core itself accepts this, and every rank would attend to its own columns alone.
            raise ValueError(
                f"context parallelism: got hierarchical_context_parallel_sizes={sizes} for context_parallel_size="
                f"{config.context_parallel_size}, expected [a, b] with a x b = {config.context_parallel_size}. "
                f"Fix: hierarchical_context_parallel_sizes=[1, {config.context_parallel_size}]"
            )
        self.softmax_scale = softmax_scale
        self.inner, self.outer = parallel_state.get_hierarchical_context_parallel_groups()

    def forward(self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, attention_mask, **_) -> Tensor:
        """[S, B, N * D]. The mask's queries and keys are those of `attended_columns`."""
        inputs = [heads_to_columns(x, self.inner) for x in (query_SBND, key_SBGD, value_SBGD)]
        query, key, value = inputs[0], *(gather(x, self.outer) for x in inputs[1:])
        return columns_to_heads(attend(query, key, value, attention_mask, self.softmax_scale), self.inner)


def gather(x_SBND: Tensor, group) -> Tensor:
    """Columns of all ranks of `group`, one behind the other; the gradient is summed back to its owner."""
    return tensor_parallel.gather_from_sequence_parallel_region(x_SBND.contiguous(), group=group)


def heads_to_columns(x_SBND: Tensor, group) -> Tensor:
    """[S, B, N, D] of all heads to [A x S, B, N / A, D] of this rank's share of the heads."""
    columns, ranks = len(x_SBND), group.size()
    parts_ASBND = torch.stack(x_SBND.chunk(ranks, dim=2))
    return tensor_parallel.all_to_all(group, parts_ASBND).reshape(ranks * columns, *parts_ASBND.shape[2:])


def columns_to_heads(x_SBH: Tensor, group) -> Tensor:
    """[A x S, B, H / A] back to [S, B, H]."""
    parts_ASBH = x_SBH.unflatten(0, (group.size(), -1)).contiguous()
    return torch.cat(tensor_parallel.all_to_all(group, parts_ASBH).unbind(0), dim=-1)
