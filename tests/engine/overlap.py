"""Transformer Engine's userbuffers without a GPU: buffers whose parts torch.distributed exchanges between the ranks.

Nothing overlaps here, but everything that Transformer Engine's Python decides is its own: which buffer a linear uses,
what is in it, how it is exchanged, and who reads the result. What a rank may not read yet is not a number.
"""

from __future__ import annotations

import enum
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor


class CommOverlapType(enum.IntEnum):
    RS = 0
    AG = 1


class CommOverlapHelper:
    """The processes of one machine, which `initialize_ub` names."""

    def __init__(self, world: dist.ProcessGroup, machine: dist.ProcessGroup) -> None:
        self.group = machine


class CommOverlap:
    """One buffer of `shape` [tokens, width], of which each rank owns a part of the rows."""

    exchanges: Counter[tuple[CommOverlapType, bool]] = Counter()
    """How often buffers were exchanged: gathered or scattered; apart from the product that ran, or with it."""

    def __init__(self, shape, dtype, helper: CommOverlapHelper, tp_size: int, comm_type, **settings) -> None:
        assert helper.group.size() == tp_size and shape[0] % tp_size == 0
        self.whole = torch.empty(tuple(shape), dtype=dtype, device="cpu")
        self.group, self.kind, self.splits = helper.group, comm_type, settings.get("num_splits", 1)
        self._spoil(self.whole)

    def with_cublasmp(self) -> bool:
        return False

    def is_fp8_ubuf(self) -> bool:
        return self.whole.dtype is torch.uint8

    @property
    def _own(self) -> Tensor:
        return self.whole.chunk(self.group.size())[self.group.rank()]

    def _spoil(self, part: Tensor) -> None:
        part.fill_(0x7F if self.is_fp8_ubuf() else float("nan"))  # as E4M3 and as E5M2, too

    def copy_into_buffer(self, tensor: Tensor, local_chunk: bool = False) -> None:
        """Refuses a tensor of another size, as the extension does."""
        target = self._own if local_chunk else self.whole
        assert tensor.numel() == target.numel() and tensor.element_size() == target.element_size()
        self._spoil(self.whole)
        target.copy_(tensor.view_as(target))

    def get_buffer(self, local_chunk: bool = False, shape=None) -> Tensor:
        part = self._own if local_chunk else self.whole
        return part if shape is None else part.view(*shape)

    def gather(self, apart: bool) -> None:
        """All ranks' parts, before the product that uses them or beside one that does not (`apart`)."""
        assert self.kind is CommOverlapType.AG
        self.exchanges[self.kind, apart] += 1
        dist.all_gather_into_tensor(self.whole, self._own.clone(), group=self.group)

    def scatter(self, product: Tensor, target: Tensor, apart: bool) -> None:
        """The sum of all ranks' `product`, of which this rank's rows go to `target`."""
        assert self.kind is CommOverlapType.RS and product.shape[0] == self.whole.shape[0], "another length of rows"
        assert product.shape[-1] % self.splits == 0
        self.exchanges[self.kind, apart] += 1
        dist.reduce_scatter_tensor(target.view(-1, target.shape[-1]), product.contiguous(), group=self.group)

    def scatter_itself(self) -> None:
        """The same for the product that the buffer holds; only this rank's rows are left."""
        product = self.whole.clone()
        self._spoil(self.whole)
        self.scatter(product, self._own, apart=True)


CommOverlapP2P = CommOverlap


def get_stream_priority_range() -> tuple[int, int]:
    return 0, -5


def device_supports_multicast() -> bool:
    return True


def ubuf_built_with_mpi() -> bool:
    return False
