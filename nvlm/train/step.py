"""One optimizer step: micro-batches forward and backward, gradients, update."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nvlm import parallel
from nvlm.batch import Batch
from nvlm.data.loader import StepData
from nvlm.train.guard import NAN_ONLY, Guard, after, is_bad
from nvlm.train.optim import prepare, update
from nvlm.vision.path import VisionPath


@dataclass(frozen=True, slots=True)
class Trainer:
    """What a step works on. `chunks`: this process's parts of the model, one for each virtual pipeline stage."""

    chunks: tuple[DistributedDataParallel, ...]
    vision: VisionPath
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
    guard: Guard  # behind this step
    stop: bool  # a signal came to some rank: all of them end after this step


def _forward(batches, model, trainer: Trainer):
    batch: Batch = trainer.vision.encode(next(batches).to(trainer.device))
    return model(batch), functools.partial(_sum_loss, batch)


def _sum_loss(batch: Batch, loss_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    # A sum and a count: Megatron divides by the count of all replicas and micro-batches once, at the end.
    total, count = loss_BS.sum(), torch.tensor(batch.num_trained, device=loss_BS.device)
    return total, count, {"loss": total.detach()}


def train_step(
    trainer: Trainer,
    data: StepData,
    guard: Guard = NAN_ONLY,
    stop: Sequence[int] = (),
    mark: Callable[[str], None] = lambda phase: None,
) -> StepResult:
    """Run `data` through the model and update it, unless `guard` calls the step bad.

    `stop`: signals that came to this rank, looked at near the end of the step. `mark`: told of each phase.
    """
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()  # fp32 parameters alias the buffers, yet both calls are needed
    mark("forward-backward")
    losses = get_forward_backward_func()(
        forward_step_func=functools.partial(_forward, trainer=trainer),
        data_iterator=iter(data.micro_batches),
        model=list(trainer.chunks),
        num_microbatches=len(data.micro_batches),
        seq_length=data.micro_batches[0].tokens.shape[1],
        micro_batch_size=data.micro_batches[0].tokens.shape[0],
        forward_only=False,
    )
    mark("optimizer")
    grad_norm = prepare(trainer.optimizer)
    total = sum(float(loss["loss"]) for loss in losses)
    numbers = torch.tensor(
        [not math.isfinite(total + grad_norm), bool(stop), *_counts(data, total)],
        dtype=torch.float64,
        device=trainer.device,
    )
    if not parallel.is_replica_writer():  # it speaks for its replica, but for the two flags
        numbers[2:] = 0
    broken, stops, loss, trained, *counts = parallel.sum_over_ranks(numbers).tolist()
    loss /= max(trained, 1)
    bad = is_bad(guard, loss, finite=not broken)
    if not bad:
        update(trainer.optimizer, grad_norm)
    lr = max(group["lr"] for group in trainer.optimizer.param_groups)
    trainer.schedule.step(increment=1)
    return StepResult(
        loss,
        int(trained),
        *map(int, counts),
        grad_norm=grad_norm,
        lr=lr,
        updated=not bad,
        guard=after(guard, loss, bad),
        stop=stops > 0,
    )


def _counts(data: StepData, total_loss: float) -> list[float]:
    """What a replica adds to the step's numbers, in the order of StepResult."""
    return [
        total_loss,
        sum(batch.num_trained for batch in data.micro_batches),
        sum(batch.num_tokens for batch in data.micro_batches),
        sum(batch.sample.numel() for batch in data.micro_batches),
        sum(len(batch.pixels) for batch in data.micro_batches),
        data.records,
        len(data.skipped),
    ]
