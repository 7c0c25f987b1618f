"""Self-attention over columns that are sharded over the context-parallel ranks.

Sharding is two-dimensional (LongVILA, section 3.3): within the inner group an all-to-all trades columns for heads; over
the outer group keys and values are gathered, with the same result as ring attention. nvlm.attention.context says which
rank holds which columns.

Shapes: S columns of this rank, B rows, N query heads, G key-value heads, D head width, A ranks of the all-to-all.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from nvlm.attention.context import attended_columns
from nvlm.attention.kernel import Kernel, PairKernel, View
from nvlm.config.values import Config
from nvlm.data.batch import Batch
from nvlm.processes.device import to_device


class ContextAttention(nn.Module):
    """Core attention that holds the process groups for the view's kernel."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_) -> None:
        super().__init__()
        sizes = config.hierarchical_context_parallel_sizes
        if not sizes or sizes[0] * sizes[1] != config.context_parallel_size:
            # Megatron-Core accepts this, and every rank would attend only to its own columns.
            raise ValueError(
                f"context parallelism: got hierarchical_context_parallel_sizes={sizes} for context_parallel_size="
                f"{config.context_parallel_size}, expected [a, b] with a x b = {config.context_parallel_size}. "
                f"Fix: hierarchical_context_parallel_sizes=[1, {config.context_parallel_size}]"
            )
        self.softmax_scale = softmax_scale
        self.inner, self.outer = parallel_state.get_hierarchical_context_parallel_groups()

    def forward(self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, view: View, **_) -> Tensor:
        """[S, B, N * D]."""
        return view.attend(query_SBND, key_SBGD, value_SBGD, self.softmax_scale, self)


class Context(Kernel):
    """Moves heads, keys and values between ranks; `kernel` attends.

    Its mask is a view of `kernel` on the queries and keys in `attended_columns`, with `ranks` in the all-to-all.
    """

    core = ContextAttention

    def __init__(self, kernel: PairKernel, ranks: int) -> None:
        self.kernel, self.ranks = kernel, ranks

    def columns(self, batch: Batch) -> View:
        """For whole rows. Every rank holds all sample numbers, so no communication is needed."""
        columns = attended_columns(batch.tokens.shape[1], self.ranks)
        queries_S, keys_X = (to_device(x, batch.tokens.device) for x in columns)
        return View(self, self.kernel.among(batch, queries_S, keys_X))

    def attend(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        mask: View,
        scale: float | None = None,
        core: nn.Module | None = None,
    ) -> Tensor:
        """[S, B, N * D] for this rank's columns."""
        inputs = [heads_to_columns(x, core.inner) for x in (query_SBND, key_SBGD, value_SBGD)]
        query, key, value = inputs[0], *(gather(x, core.outer) for x in inputs[1:])
        return columns_to_heads(mask.attend(query, key, value, scale), core.inner)


def gather(x_SBND: Tensor, group) -> Tensor:
    """Concatenate the columns of all ranks of `group`; gradients are reduce-scattered back."""
    return tensor_parallel.gather_from_sequence_parallel_region(x_SBND.contiguous(), group=group)


def heads_to_columns(x_SBND: Tensor, group) -> Tensor:
    """[S, B, N, D] with all heads to [A x S, B, N / A, D] with this rank's heads."""
    columns, ranks = len(x_SBND), group.size()
    parts_ASBND = torch.stack(x_SBND.chunk(ranks, dim=2))
    return tensor_parallel.all_to_all(group, parts_ASBND).reshape(ranks * columns, *parts_ASBND.shape[2:])


def columns_to_heads(x_SBH: Tensor, group) -> Tensor:
    """[A x S, B, H / A] back to [S, B, H]."""
    parts_ASBH = x_SBH.unflatten(0, (group.size(), -1)).contiguous()
    return torch.cat(tensor_parallel.all_to_all(group, parts_ASBH).unbind(0), dim=-1)


def build(config: Config, kernel: PairKernel) -> Context:
    """`kernel`, wrapped for the ranks of `config`."""
    return Context(kernel, config.parallel.context_heads)
