"""One optimizer step: micro-batches forward and backward, gradients, update."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nvlm.arch.pipeline import Pipeline
from nvlm.attention.context import own_columns
from nvlm.data.amounts import Work
from nvlm.data.batch import IGNORE, Batch
from nvlm.data.loader import StepData
from nvlm.processes import groups
from nvlm.train.guard import NAN_ONLY, Guard, after, is_bad
from nvlm.train.optim import prepare, update
from nvlm.vision.prepass import BalancedVision


@dataclass(frozen=True, slots=True)
class Trainer:
    """What a step works on. `chunks`: this rank's parts of the model, one per virtual pipeline stage. `encoder`: the
    encoder, if it learns."""

    chunks: tuple[DistributedDataParallel, ...]
    encoder: DistributedDataParallel | None
    pipeline: Pipeline
    vision: BalancedVision
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    device: torch.device
    origins: Mapping[str, str]  # where each module group's first weights come from; empty in a resumed run

    @property
    def wrapped(self) -> tuple[DistributedDataParallel, ...]:
        """All that has gradients on this rank."""
        return self.chunks if self.encoder is None else (*self.chunks, self.encoder)


def settle(trainer: Trainer) -> None:
    """Complete the weights on all ranks: an overlapped gather fetches each only when the next forward needs it."""
    for chunk in trainer.wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step's results, summed over all replicas."""

    loss: float  # mean over trained tokens
    trained_tokens: int
    positions: int  # of the text stream, padding included
    key_positions: int  # cross-attended, padding included
    records: int
    skipped: int
    fewer_tiles: int  # records whose images got fewer tiles so that they fit
    work: Work
    tiles_by_replica: tuple[int, ...]
    grad_norm: float
    lr: float
    updated: bool
    guard: Guard  # after this step
    stop: bool  # some rank received a signal: all stop after this step


def _forward(batches, model):
    batch: Batch = next(batches)
    return model(batch), functools.partial(sum_loss, batch)


def sum_loss(batch: Batch, loss_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum and number of this rank's losses. Megatron asks for both, but `optim.update` divides the gradients."""
    labels_BS = batch.labels[:, own_columns(batch.labels.shape[1])]
    total, count = loss_BS.sum(), (labels_BS != IGNORE).sum().int()
    return total, count, {"loss": total.detach()}


def forward_backward(
    trainer: Trainer, micro_batches: Sequence[Batch], mark: Callable[[str], None] = lambda phase: None
) -> float:
    """Encode the step's tiles on all ranks, then accumulate the gradients of the sum of losses over all trained tokens.

    Returns this rank's part of the sum of losses.
    """
    for chunk in trainer.wrapped:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()  # fp32 parameters alias the buffers, yet both calls are needed
    mark("vision")
    moved, forth = [batch.to(trainer.device) for batch in micro_batches], None
    if trainer.encoder is None:
        batches = trainer.vision.encode(moved)
    else:
        batches, forth = trainer.vision.forth(moved)
    mark("forward-backward")
    total = _scheduled(trainer, batches, forward_only=False)
    if trainer.encoder is not None and forth is not None:
        mark("vision")  # collective calls, with tiles or without
        trainer.vision.back(forth)
        trainer.encoder.finish_grad_sync()
    return total


@torch.no_grad()
def forward(trainer: Trainer, micro_batches: Sequence[Batch]) -> float:
    """This rank's part of the sum of losses of `micro_batches`, without gradients and dropout. A collective call."""
    for chunk in trainer.chunks:
        chunk.eval()
    try:
        with _scales_kept(trainer):
            batches = trainer.vision.encode([batch.to(trainer.device) for batch in micro_batches])
            return _scheduled(trainer, batches, forward_only=True)
    finally:
        trainer.pipeline.borrowed = None  # without gradients, it has nothing to return
        for chunk in trainer.chunks:
            chunk.train()


def _scales_kept(trainer: Trainer) -> contextlib.AbstractContextManager:
    """A block whose forward passes do not change the scales that training computes in FP8 with."""
    config = trainer.chunks[0].config
    if not config.fp8 or config.fp8_recipe != "delayed":
        return contextlib.nullcontext()
    from nvlm.llm.fp8 import scales_kept

    return scales_kept(module for chunk in trainer.chunks for module in chunk.modules())


def _scheduled(trainer: Trainer, batches: Sequence[Batch], forward_only: bool) -> float:
    """Megatron's schedule over encoded `batches`; this rank's part of the sum of losses."""
    trainer.pipeline.begin(batches)
    shape = trainer.pipeline.shape(batches)
    # Otherwise stages tell one another the shape of each message, for which the host waits until the GPU is idle.
    trainer.chunks[0].config.variable_seq_lengths = shape is None
    iterators = [iter(batches) for _ in trainer.chunks]
    losses = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(trainer.chunks),
        num_microbatches=len(batches),
        seq_length=shape[0] if shape else 0,
        micro_batch_size=shape[1] if shape else 0,
        forward_only=forward_only,
    )
    return sum(float(loss["loss"]) for loss in losses)


def train_step(
    trainer: Trainer,
    data: StepData,
    guard: Guard = NAN_ONLY,
    stop: Sequence[int] = (),
    mark: Callable[[str], None] = lambda phase: None,
) -> StepResult:
    """Run `data` through the model and update it, unless `guard` finds the step bad.

    `stop`: signals this rank has received, read near the end of the step. `mark`: called at the start of each phase.
    """
    part = forward_backward(trainer, data.micro_batches, mark)
    mark("optimizer")
    norm_of_sum = prepare(trainer.optimizer)
    own = {"broken": not math.isfinite(part + norm_of_sum), "stop": bool(stop), "loss": part * groups.is_loss_rank()}
    sums = summed(own | _counts(data), trainer.device)
    count = {name: int(total) for name, total in sums.items() if name not in own}
    tokens = max(count["trained_tokens"], 1)
    loss = sums["loss"] / tokens
    # Without a gradient Adam would still move weights.
    bad = count["trained_tokens"] == 0 or is_bad(guard, loss, finite=not sums["broken"])
    mark("optimizer")  # a second time, where the GPU has no work left: its times up to here are known
    if not bad:
        update(trainer.optimizer, norm_of_sum, tokens)
    lr = trainer.schedule.get_lr({})
    trainer.schedule.step(increment=1)
    return StepResult(
        loss,
        **{name: count[name] for name in _COUNTED},
        work=Work(**{name: count[f"work {name}"] for name in _WORK}),
        tiles_by_replica=tuple(count[f"tiles of replica {r}"] for r in range(groups.data_rank()[1])),
        grad_norm=norm_of_sum / tokens,
        lr=lr,
        updated=not bad,
        guard=after(guard, loss, bad),
        stop=sums["stop"] > 0,
    )


def summed(own: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Each value summed over all ranks, whose `own` have the same names in the same order. One collective call."""
    values = torch.tensor(list(own.values()), dtype=torch.float64, device=device)
    return dict(zip(own, groups.sum_over_ranks(values).tolist()))


_COUNTED = ("trained_tokens", "positions", "key_positions", "records", "skipped", "fewer_tiles")
_WORK = tuple(field.name for field in fields(Work))


def _counts(data: StepData) -> dict[str, int]:
    """Counts of a replica's step by name, from one of its ranks; zeros on its other ranks."""
    replica, replicas = groups.data_rank()
    batches = data.micro_batches
    counts = {
        "trained_tokens": sum(batch.num_trained for batch in batches),
        "positions": sum(batch.sample.numel() for batch in batches),
        "key_positions": sum(batch.cross_sample.numel() for batch in batches),
        "records": data.records,
        "skipped": len(data.skipped),
        "fewer_tiles": data.fewer_tiles,
    }
    counts |= {f"work {name}": amount for name, amount in asdict(data.work).items()}
    counts |= {f"tiles of replica {r}": data.work.tiles * (r == replica) for r in range(replicas)}
    return counts if groups.is_replica_writer() else dict.fromkeys(counts, 0)
