"""One model with one set of weights in any layout: gradients from the trainer's own step, gathered for comparison.

Weights reach the ranks through a checkpoint written by one process, and gradients come back through a checkpoint
written by the layout, so each comparison also tests that checkpoints are split and joined correctly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from safetensors.torch import save_file
from torch import Tensor

from nvlm.config.rules import validate
from nvlm.config.values import Config
from nvlm.data.batch import Sample
from nvlm.data.pack import collate
from nvlm.processes import groups
from nvlm.train.loop import build_trainer
from nvlm.train.optim import prepare as prepare_gradients
from nvlm.train.step import Trainer, forward_backward
from nvlm.vision.encoders.internvit import description as internvit
from nvlm.weights.parts import published
from tests.dist.run import joined, run_distributed, save_without_a_server
from tests.models import TILE, Story, Twins, below, build_twins, reference_sample, sample_of, to_reference
from tests.stories import ONE, ONE_TILE, SIDE_BY_SIDE, SIX, TEXT, TWO

# Packed rows, several images a sample, text alone, and rows of one step that differ in length.
MICRO_BATCHES = (
    ((TWO, TEXT, ONE_TILE), (SIDE_BY_SIDE, ONE)),
    ((TEXT,), (TEXT, TEXT)),
    ((SIX,),),
    ((ONE,), (TEXT,), (TWO,)),
)


LAYOUTS = {
    2: {
        "tensor 2": dict(tensor=2),
        "tensor 2, sequence": dict(tensor=2, sequence=True),
        "pipeline 2": dict(pipeline=2),
        "pipeline 2 x virtual 2": dict(pipeline=2, virtual=2),
        "context 2, keys gathered": dict(context=2),
        "context 2, heads traded": dict(context=2, context_heads=2),
        "data 2": dict(),
        "data 2, global balance": dict(balance="global"),
    },
    4: {
        "tensor 2 x pipeline 2": dict(tensor=2, sequence=True, pipeline=2),
        "tensor 2 x pipeline 2 x virtual 2": dict(tensor=2, pipeline=2, virtual=2),
        "tensor 2 x context 2": dict(tensor=2, sequence=True, context=2),
        "pipeline 2 x data 2": dict(pipeline=2),
        "pipeline 2 x virtual 2 x data 2, global balance": dict(pipeline=2, virtual=2, balance="global"),
        "pipeline 4": dict(pipeline=4),
        "pipeline 2 x context 2": dict(pipeline=2, context=2, context_heads=2),
        "context 2 x 2": dict(context=4, context_heads=2),
        "data 4, global balance": dict(balance="global"),
    },
    8: {
        "tensor 2 x pipeline 2 x context 2": dict(tensor=2, sequence=True, pipeline=2, context=2),
        "tensor 2 x pipeline 2 x data 2, global balance": dict(tensor=2, pipeline=2, balance="global"),
    },
}
ALL = [
    pytest.param(world, layout, id=layout, marks=[pytest.mark.slow] if world > 2 else [])
    for world, layouts in LAYOUTS.items()
    for layout in layouts
]


@dataclass(frozen=True)
class Case:
    """Rows of stories by micro-batch, and a model in its own folder."""

    config: Config
    folder: Path
    micro_batches: tuple[tuple[tuple[Story, ...], ...], ...]

    def laid_out(self, **sizes) -> Case:
        """The same in another layout; settings of `vision`, `stage` and `train` may be given too."""
        config = self.config
        for group in ("vision", "stage", "train"):
            known = {k: sizes.pop(k) for k in list(sizes) if k in getattr(config, group).__dataclass_fields__}
            config = replace(config, **{group: replace(getattr(config, group), **known)})
        return replace(self, config=validate(replace(config, parallel=replace(config.parallel, **sizes))))


def metadata() -> dict:
    """The metadata that Megatron's sharded state needs."""
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def prepare(config: Config, folder: Path, micro_batches) -> tuple[Case, Twins]:
    """Write the weights of twins of `config` where every layout finds them. Runs in one process, with its groups."""
    twins = build_twins(config)
    state = dict(twins.reference.named_parameters())
    tower = {name: t.float().contiguous() for name, t in below("vision_model.", state).items()}
    save_file(tower, folder / "tower.safetensors")
    (folder / "weights").mkdir()
    save_without_a_server()
    dist_checkpointing.save(twins.model.sharded_state_dict(metadata=metadata()), str(folder / "weights"))
    init = replace(config.init, vision=str(folder / "tower.safetensors"))
    return Case(replace(config, init=init), folder, micro_batches), twins


def reference_gradients(twins: Twins, case: Case) -> tuple[float, dict[str, Tensor]]:
    """The plain reference's mean loss over trained tokens and its gradients, one story at a time."""
    twins.reference.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for story in (story for rows in case.micro_batches for row in rows for story in row):
        sample = reference_sample(story, twins.config)
        loss = twins.reference(sample).sum()
        loss.backward()
        total, count = total + float(loss), count + sum(label >= 0 for label in sample.labels)
    named = {name: p for name, p in twins.reference.named_parameters() if p.requires_grad}
    return total / count, {n: (torch.zeros_like(p) if p.grad is None else p.grad) / count for n, p in named.items()}


def load_weights(trainer: Trainer, folder: Path) -> None:
    """Load the weights that `prepare` wrote into every part."""
    parts = dict(enumerate(trainer.pipeline.parts))
    states = {number: part.sharded_state_dict(metadata=metadata()) for number, part in parts.items()}
    for number, state in dist_checkpointing.load(states, str(folder)).items():
        parts[number].load_state_dict(state)


def own_batches(case: Case, length: int | None = None) -> list:
    """This replica's micro-batches: every n-th. `length`: of all rows; by default the longest of their micro-batch."""
    rank, size = groups.data_rank()
    config, (seat, seats) = case.config, groups.seat()
    first = [0, *itertools.accumulate(map(len, case.micro_batches))]
    return [
        collate(
            [[dealt(sample_of(s, config), seat, seats) for s in row] for row in rows],
            TILE,
            config.row_multiple,
            numbers=range(number, number + len(rows)),
            length=length,
        )
        for rows, number in list(zip(case.micro_batches, first))[rank::size]
    ]


def dealt(sample: Sample, seat: int, seats: int) -> Sample:
    """`sample` as the loader of rank `seat` of its replica makes it: with the pixels of some tiles only."""
    if not len(sample.pixels):
        return sample
    holder = (torch.arange(len(sample.pixels)) // 2 + len(sample.tokens)) % seats
    return replace(sample, holder=holder, pixels=sample.pixels[holder == seat])


@dataclass(frozen=True)
class Outcome:
    """What one rank observed in a step."""

    loss: float
    grad_norm: float
    encoded: int  # tiles that it encoded
    copies_differ: float


def step_in_layout(case: Case, out: Path) -> Outcome:
    """One step on this rank of the layout; gradients go to `out` as a checkpoint of the whole model."""
    with joined(case.config) as device:
        trainer = build_trainer(case.config, device)
        if (case.folder / "weights").is_dir():  # else config.init names them
            load_weights(trainer, case.folder / "weights")
        encoded = count_tiles(trainer)
        batches = own_batches(case)
        part = forward_backward(trainer, batches)
        trained = sum(batch.num_trained for batch in batches) if groups.is_replica_writer() else 0
        loss, count = groups.sum_over_ranks(
            torch.tensor([part if groups.is_loss_rank() else 0.0, trained], dtype=torch.float64)
        ).tolist()
        trainer.optimizer.prepare_grads()
        norm = trainer.optimizer.get_grad_norm() / count
        for wrapped in trainer.wrapped:
            complete(wrapped)
        for parameter in (p for wrapped in trainer.wrapped for p in wrapped.module.parameters()):
            parameter.data.copy_(
                parameter.main_grad / count if parameter.requires_grad else torch.zeros_like(parameter)
            )
        differ = max((spread_of(copied) for copied in trainer.pipeline.copied), default=0.0)
        if dist_rank() == 0:
            out.mkdir()
        torch.distributed.barrier()
        states = [wrapped.module.sharded_state_dict(metadata=metadata()) for wrapped in trainer.wrapped]
        dist_checkpointing.save({f"part{n}": state for n, state in enumerate(states)}, str(out))
        return Outcome(loss / count, float(norm), sum(encoded), differ)


def complete(wrapped: DistributedDataParallel) -> None:
    """Give each rank all gradients: with the distributed optimizer it has the sums of its shard."""
    if not wrapped.ddp_config.use_distributed_optimizer:
        return
    for group in wrapped.bucket_groups:
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            own = bucket.grad_data.view(ranks.size(), -1)[ranks.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def shapes_told(case: Case) -> list[tuple[float, float, int]]:
    """This rank's part of the loss, the gradients' norm and how often it told a stage the shape of a message: with rows
    as long as their micro-batch needs, and with rows of one length."""
    told, real = [], P2PCommunicator._communicate_shapes
    P2PCommunicator._communicate_shapes = lambda *given: told.append(given) or real(*given)
    with joined(case.config) as device:
        trainer, found = build_trainer(case.config, device), []
        load_weights(trainer, case.folder / "weights")
        longest = max(batch.tokens.shape[1] for batch in own_batches(case))
        for length in (None, longest):
            told.clear()
            part = forward_backward(trainer, own_batches(case, length))
            found.append((part, prepare_gradients(trainer.optimizer), len(told)))
    return found


def dist_rank() -> int:
    """Rank of this process."""
    return torch.distributed.get_rank()


def count_tiles(trainer: Trainer) -> list[int]:
    """A list that gets the number of tiles of each call of the encoder."""
    calls: list[int] = []
    features = trainer.vision.path.features

    def counted(pixels, *tokens):
        calls.append(len(pixels))
        return features(pixels, *tokens)

    trainer.vision.path.features = counted
    return calls


def spread_of(copied) -> float:
    """Largest difference between the copies of a parameter."""
    low, high = copied.parameter.data.clone(), copied.parameter.data.clone()
    torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN, group=copied.group)
    torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX, group=copied.group)
    return float((high - low).abs().max())


def gradients_of(twins: Twins, out: Path) -> dict[str, Tensor]:
    """The gradients that a layout wrote, under the reference's names. Runs in one process."""
    state = twins.model.sharded_state_dict(metadata=metadata())
    loaded = dist_checkpointing.load({"part0": state}, str(out))["part0"]
    named = {twins.model.whole_name(n): t for n, t in loaded.items() if torch.is_tensor(t)}
    return to_reference(named, twins.config)


def encoder_gradients_of(twins: Twins, out: Path) -> dict[str, Tensor]:
    """Those of the encoder, if it learned."""
    found = below("vision.", dist_checkpointing.load_plain_tensors(str(out)))
    named = published(internvit.parts(twins.config.vision), found)
    return {f"vision_model.{name}": tensor for name, tensor in named.items()}


def run_cases(cases: Sequence[tuple[Case, Path]]) -> list[Outcome]:
    """All `cases`, one after another, in this process."""
    return [step_in_layout(case, out) for case, out in cases]


def outcomes_of[Key](cases_of: Callable[[int], Mapping[Key, Case]], root: pytest.TempPathFactory) -> Callable:
    """A function from (world, key) to each rank's outcome of a case and the place of its gradients.

    The first call for a number of processes runs all of its cases.
    """
    done: dict[int, dict] = {}

    def of(world: int, key: Key) -> tuple[list[Outcome], Path]:
        if world not in done:
            cases, place = cases_of(world), root.mktemp(f"world{world}")
            outs = [place / str(number) for number in range(len(cases))]
            by_rank = run_distributed(run_cases, world, list(zip(cases.values(), outs)), timeout=900)
            done[world] = dict(zip(cases, zip(zip(*by_rank), outs)))
        return done[world][key]

    return of
