"""Context parallelism: which rank holds which columns of a row.

The order is zigzag: a row is cut into 2 P equal chunks, and rank p of P holds chunks p and 2 P - 1 - p, so that all
ranks have the same work under a causal mask.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from nvlm.processes.device import to_device


def zigzag(length: int, rank: int, size: int) -> Tensor:
    """Columns [length / size] of `rank`; raises ValueError if `length` is not a multiple of 2 x size."""
    if size == 1:
        return torch.arange(length)
    chunk, rest = divmod(length, 2 * size)
    if rest:
        raise ValueError(f"row length: got {length} columns, expected a multiple of 2 x {size} context-parallel ranks")
    starts = (rank * chunk, (2 * size - 1 - rank) * chunk)
    return torch.cat([torch.arange(start, start + chunk) for start in starts])


def own_columns(length: int) -> Tensor:
    """The columns of a row that this rank computes."""
    return zigzag(length, parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size())


def all_columns(length: int) -> Tensor:
    """All columns of a row, in the order in which the ranks hold them."""
    size = parallel_state.get_context_parallel_world_size()
    return torch.cat([zigzag(length, rank, size) for rank in range(size)])


def attended_columns(length: int, inner: int) -> tuple[Tensor, Tensor]:
    """The columns of queries and of keys in self-attention on this rank, with `inner` ranks in the all-to-all."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    first = rank // inner * inner
    queries = [zigzag(length, member, size) for member in range(first, first + inner)]
    return torch.cat(queries), all_columns(length)


def gather_columns(hidden_SBH: Tensor) -> Tensor:
    """Hidden states of all columns, in row order. No gradient flows back."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return hidden_SBH.detach()
    whole = tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH.detach(), group=group)
    return whole[to_device(all_columns(len(whole)).argsort(), whole.device)]
