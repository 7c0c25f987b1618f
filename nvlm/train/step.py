"""One optimizer step: micro-batches forward and backward, gradients, update."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nvlm import parallel
from nvlm.arch.stages import Stages
from nvlm.batch import IGNORE, Batch
from nvlm.data.loader import StepData
from nvlm.llm.context import own_columns
from nvlm.vision.balance import BalancedVision


@dataclass(frozen=True, slots=True)
class Trainer:
    """What a step works on. `chunks`: this process's parts of the model, one for each virtual pipeline stage."""

    chunks: tuple[DistributedDataParallel, ...]
    stages: Stages
    vision: BalancedVision
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    device: torch.device


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sums over all replicas of one step."""

    loss: float  # mean over trained tokens
    trained_tokens: int
    tokens: int  # real positions of the text stream
    positions: int  # positions computed, padding included
    tiles: int
    records: int
    skipped: int
    grad_norm: float
    lr: float
    updated: bool


def _forward(batches, model):
    batch: Batch = next(batches)
    return model(batch), functools.partial(_sum_loss, batch)


def _sum_loss(batch: Batch, loss_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    # A sum and a count: Megatron divides by the count of all replicas and micro-batches once, at the end.
    labels_BS = batch.labels[:, own_columns(batch.labels.shape[1])]
    total, count = loss_BS.sum(), (labels_BS != IGNORE).sum().int()
    return total, count, {"loss": total.detach()}


def forward_backward(trainer: Trainer, micro_batches: Sequence[Batch]) -> float:
    """Gradients of the mean loss over all trained tokens, into the buffers; returns this process's part of the sum
    of losses. The frozen encoder's tiles are done first, on all ranks."""
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()  # fp32 parameters alias the buffers, yet both calls are needed
    batches = trainer.vision.encode([batch.to(trainer.device) for batch in micro_batches])
    trainer.stages.begin(batches)
    iterators = [iter(batches) for _ in trainer.chunks]
    losses = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(trainer.chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=False,
    )
    return sum(float(loss["loss"]) for loss in losses)


def train_step(trainer: Trainer, data: StepData) -> StepResult:
    """Run `data` through the model and update it."""
    loss = forward_backward(trainer, data.micro_batches)
    updated, grad_norm, _ = trainer.optimizer.step()
    lr = trainer.schedule.get_lr({})
    trainer.schedule.step(increment=1)
    sums = parallel.sum_over_all(
        torch.tensor(
            [loss if parallel.is_loss_rank() else 0.0, *_counts(data)], dtype=torch.float64, device=trainer.device
        )
    ).tolist()
    loss, trained, *counts = sums
    return StepResult(
        loss / max(trained, 1),
        int(trained),
        *map(int, counts),
        grad_norm=float(grad_norm or 0),
        lr=lr,
        updated=updated,
    )


def _counts(data: StepData) -> list[int]:
    """What a replica's step is made of, told by one of its processes."""
    if not parallel.is_replica_writer():
        return [0] * 6
    batches = data.micro_batches
    return [
        sum(batch.num_trained for batch in batches),
        sum(batch.num_tokens for batch in batches),
        sum(batch.sample.numel() for batch in batches),
        sum(len(batch.pixels) for batch in batches),
        data.records,
        len(data.skipped),
    ]
