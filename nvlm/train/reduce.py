"""Gradients between replicas: they travel in bf16 and are added up in fp32.

Each rank of the distributed optimizer sends every other rank its part of that rank's shard, and adds what it receives.
A gradient is rounded once, before it is sent; sums of micro-batches and of replicas are fp32. On the wire this is half
of an fp32 reduce-scatter.

Megatron-Core can do this too, but keeps a second gradient buffer in bf16 (2 bytes per parameter), copies each
parameter's gradient there and back, and rounds the sum. Its choice also holds for all models of the process.

Shapes: R ranks that sum, N elements of a rank's shard.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

BUCKET = 128_000_000  # gradients that travel together, as soon as the backward pass has all of them
PIECE = 2**27  # gradients in one message; its two copies take 4 bytes each


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of all shards on its way: `received` [R, n] in bf16, and the part [n] of this rank's shard, in fp32."""

    work: dist.Work
    received: Tensor
    shard: Tensor

    def add(self) -> None:
        """Wait for the other ranks' gradients, and write their sum over this rank's own."""
        self.work.wait()
        torch.sum(self.received, dim=0, dtype=torch.float32, out=self.shard)


class Pieces:
    """Pieces on their way; `wait` is what Megatron calls when it needs the sums."""

    def __init__(self) -> None:
        self.coming: deque[Piece] = deque()

    def send(self, gradients: Tensor, group: dist.ProcessGroup) -> None:
        """Start to sum `gradients` [R * N], fp32, over `group`: afterwards, rank r has the sum in its shard [N]."""
        parts_RN = gradients.view(group.size(), -1)
        width = max(1, PIECE // group.size())
        for start in range(0, parts_RN.shape[1], width):
            if len(self.coming) > 1:  # one is sent while the one before it is summed
                self.coming.popleft().add()
            part_Rn = parts_RN[:, start : start + width]
            sent = torch.empty_like(part_Rn, dtype=torch.bfloat16, memory_format=torch.contiguous_format).copy_(part_Rn)
            received = torch.empty_like(sent)
            work = dist.all_to_all_single(received, sent, group=group, async_op=True)
            self.coming.append(Piece(work, received, part_Rn[group.rank()]))

    def wait(self) -> None:
        """Finish all sums. On a GPU, later kernels wait, not the host."""
        while self.coming:
            self.coming.popleft().add()


@torch.no_grad()
def _start(group, before, force_all_reduce: bool = False) -> None:
    """Megatron's `start_grad_sync` of a bucket group, in bf16. `before`: the group that is sent before it, or None."""
    assert not force_all_reduce
    if group.grad_reduce_handle is not None:  # started by hand, in the first step
        return
    if before is not None and before.grad_reduce_handle is not None:
        before.finish_grad_sync()  # frees its copies
    pieces = Pieces()
    for bucket in group.buckets:
        pieces.send(bucket.grad_data, group.intra_distributed_optimizer_instance_group)
    if group.ddp_config.overlap_grad_reduce:
        group.grad_reduce_handle = pieces
    else:
        pieces.wait()


def send_in_bf16(wrapped: DistributedDataParallel) -> None:
    """Let the gradients of `wrapped` travel in bf16. Its buffers are fp32, and its optimizer is distributed.

    Where there is one rank to a sum, nothing travels, and gradients stay as they are.
    """
    before = None
    for group in wrapped.bucket_groups:
        if group.intra_distributed_optimizer_instance_size > 1:
            group.start_grad_sync = functools.partial(_start, group, before)
            before = group
