"""What an attention kernel is. Each has a file in nvlm.attention.kernels; nvlm.attention.choice says which is used.

Shapes: S queries, X keys, B rows, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from nvlm.attention.cache import KeepsKeys
from nvlm.attention.precision import for_kernel
from nvlm.data.batch import Batch


@dataclass(frozen=True, slots=True)
class View:
    """What queries may look at: a mask in the form that `kernel` makes and reads."""

    kernel: Kernel
    mask: Any

    def attend(
        self,
        query_SBND: Tensor,
        key_XBGD: Tensor,
        value_XBGD: Tensor,
        scale: float | None = None,
        core: nn.Module | None = None,
    ) -> Tensor:
        """softmax(scale q k^T) v over the keys in view, [S, B, N * D]; a query that sees no key gets exactly zero.

        `scale`: None for 1 / sqrt(D). `core`: the layer's core attention, where a kernel needs what it holds.
        """
        return self.kernel.attend(query_SBND, key_XBGD, value_XBGD, self.mask, scale, core)


class CoreAttention(nn.Module, KeepsKeys):
    """The core attention of Megatron's layers: whatever kernel made the view attends, also to what a cache keeps."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError(f"CoreAttention: got context parallel size {config.context_parallel_size}, expected 1")
        self.softmax_scale = softmax_scale

    def forward(self, query_SBND: Tensor, key_XBGD: Tensor, value_XBGD: Tensor, view: View, **_) -> Tensor:
        """[S, B, N * D]; `view` (where Megatron passes its attention mask) is of the keys of all columns."""
        if self.cache is not None:
            key_XBGD, value_XBGD = self.cache.append(key_XBGD, value_XBGD)
        return view.attend(query_SBND, key_XBGD, value_XBGD, self.softmax_scale)


class Kernel(ABC):
    """Makes its own form of mask, and attends through it."""

    core: type[nn.Module] = CoreAttention
    """The core attention that Megatron's layer specs name where this kernel trains."""

    @abstractmethod
    def columns(self, batch: Batch) -> View:
        """What the tokens of a micro-batch see of each other, in self-attention."""

    def keys(self, batch: Batch, columns_S: Tensor) -> View:
        """What the tokens in the columns `columns_S` see of the cross-attended keys."""
        raise NotImplementedError(f"{type(self).__name__}: it is for self-attention alone")

    @abstractmethod
    def attend(
        self,
        query_SBND: Tensor,
        key_XBGD: Tensor,
        value_XBGD: Tensor,
        mask: Any,
        scale: float | None = None,
        core: nn.Module | None = None,
    ) -> Tensor:
        """As `View.attend`, with a mask of this kernel's own form."""


class TorchKernel(Kernel):
    """A kernel that takes torch's order of dimensions."""

    def attend(
        self,
        query_SBND: Tensor,
        key_XBGD: Tensor,
        value_XBGD: Tensor,
        mask: Any,
        scale: float | None = None,
        core: nn.Module | None = None,
    ) -> Tensor:
        """[S, B, N * D]."""
        inputs = (for_kernel(x).permute(1, 2, 0, 3) for x in (query_SBND, key_XBGD, value_XBGD))
        return self.attended(*inputs, mask, scale).permute(2, 0, 1, 3).flatten(2).to(query_SBND.dtype)

    @abstractmethod
    def attended(
        self, query_BNSD: Tensor, key_BGXD: Tensor, value_BGXD: Tensor, mask: Any, scale: float | None
    ) -> Tensor:
        """[B, N, S, D]."""


class PairKernel(TorchKernel):
    """A kernel whose mask is made pair by pair, so also of some columns alone."""

    def columns(self, batch: Batch) -> View:
        """Of whole rows."""
        every = torch.arange(batch.sample.shape[1], device=batch.sample.device)
        return self.among(batch, every, every)

    @abstractmethod
    def among(self, batch: Batch, queries_S: Tensor, keys_X: Tensor) -> View:
        """What tokens in the columns `queries_S` see of those in the columns `keys_X`."""


@dataclass
class Masks(PackedSeqParams):
    """What Megatron hands through to every layer of a micro-batch, also to recomputed ones, for which it keeps only
    tensors among the arguments.

    Its own fields are left empty, so that Megatron lays nothing out anew: rotary angles come token by token.
    """

    columns: View | None = None  # what self-attention sees
    keys: View | None = None  # what cross-attention sees; None where there is none
