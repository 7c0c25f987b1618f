"""The interface of an attention kernel. Each has a file in nvlm.attention.kernels; nvlm.attention.choice picks one.

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
    """What queries may attend to: a mask in the form of `kernel`."""

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
        """softmax(scale q k^T) v over the visible keys, [S, B, N * D]; exactly zero for a query that sees no key.

        `scale`: None for 1 / sqrt(D). `core`: the layer's core attention, if the kernel needs it.
        """
        return self.kernel.attend(query_SBND, key_XBGD, value_XBGD, self.mask, scale, core)


class CoreAttention(nn.Module, KeepsKeys):
    """The core attention of Megatron's layers: applies the view's kernel, and a cache if one is attached."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError(f"CoreAttention: got context parallel size {config.context_parallel_size}, expected 1")
        self.softmax_scale = softmax_scale

    def forward(self, query_SBND: Tensor, key_XBGD: Tensor, value_XBGD: Tensor, view: View, **_) -> Tensor:
        """[S, B, N * D]; `view`, passed in place of Megatron's attention mask, covers the keys of all columns."""
        if self.cache is not None:
            key_XBGD, value_XBGD = self.cache.append(key_XBGD, value_XBGD)
        return view.attend(query_SBND, key_XBGD, value_XBGD, self.softmax_scale)


class Kernel(ABC):
    """Makes a mask in its own form, and attends under it."""

    core: type[nn.Module] = CoreAttention
    """The core attention in Megatron's layer specs when this kernel is used for training."""

    @abstractmethod
    def columns(self, batch: Batch) -> View:
        """The self-attention view of a micro-batch."""

    def keys(self, batch: Batch, columns_S: Tensor) -> View:
        """The cross-attention view of the tokens in `columns_S`."""
        raise NotImplementedError(f"{type(self).__name__}: supports self-attention only")

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
        """As `View.attend`, with a mask in this kernel's form."""


class TorchKernel(Kernel):
    """A kernel with torch's order of dimensions."""

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
    """A kernel whose mask is defined pair by pair, so it can also be made for a subset of the columns."""

    def columns(self, batch: Batch) -> View:
        """For whole rows."""
        every = torch.arange(batch.sample.shape[1], device=batch.sample.device)
        return self.among(batch, every, every)

    @abstractmethod
    def among(self, batch: Batch, queries_S: Tensor, keys_X: Tensor) -> View:
        """The view of the tokens in columns `queries_S` onto those in columns `keys_X`."""


@dataclass
class Masks(PackedSeqParams):
    """Carries the views through Megatron to every layer of a micro-batch.

    A subclass of PackedSeqParams, because Megatron passes those on to recomputed layers too; of other arguments only
    tensors survive. The inherited fields stay empty, so that Megatron does not treat rows as packed: rotary angles are
    computed per token.
    """

    columns: View | None = None  # of self-attention
    keys: View | None = None  # of cross-attention; None without it
