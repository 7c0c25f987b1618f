"""Trainers that save and load inside `run_distributed`, and the contents of their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from nvlm.commands.compose import compose_config
from nvlm.data.loader import load_steps
from nvlm.train.checkpoint import restore, save
from nvlm.train.checkpoint.save import Checkpoints, latest
from nvlm.train.loop import build_steps, build_trainer
from nvlm.train.step import Trainer, train_step
from tests.dist.run import joined

SMALL = (
    "data.records=16", "data.workers=0", "train.global_batch=4", "llm.layers=4", "llm.cross_every=2",
    "optim.warmup=2", "train.steps=6",
)  # fmt: skip
FP32 = (*SMALL, "precision=fp32")
FROZEN = (*SMALL, "precision=bf16", "stage=pretrain", "arch=xattn")


def built(overrides: tuple[str, ...], device, first: int = 0) -> tuple[Trainer, Callable[[], tuple[float, float]]]:
    """A new trainer, and a function that runs the steps after `first` and returns loss and gradient norm."""
    config = compose_config(*overrides)
    trainer = build_trainer(config, device)
    data = iter(load_steps(build_steps(config), first, 0))

    def step() -> tuple[float, float]:
        result = train_step(trainer, next(data))
        return result.loss, result.grad_norm

    return trainer, step


def saved(trainer: Trainer, overrides: tuple[str, ...], run: Path, step: int, **extra) -> Path:
    """Save and wait."""
    with Checkpoints(compose_config(*overrides).train, run) as checkpoints:
        checkpoints.save(trainer, step, extra)
    return latest(run)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, from a reader that knows no layout."""
    frozen = folder.parent / save.FROZEN
    return {
        name: tensor
        for part in (folder, frozen)
        if part.is_dir()
        for name, tensor in dist_checkpointing.load_plain_tensors(str(part)).items()
        if torch.is_tensor(tensor)
    }


def held_by(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What one process without the distributed optimizer holds, under the names that a checkpoint should use."""
    named, states = {}, {}
    for part in trainer.optimizer.chained_optimizers:
        states |= part.optimizer.state if part.optimizer is not None else {}
    weights = [  # one process has all of the model in its only part
        (getattr(wrapped.module, "whole_name", str)(name), weight)
        for wrapped in trainer.wrapped
        for name, weight in wrapped.module.named_parameters()
    ]
    for name, weight in weights:
        named[name] = weight.detach()
        main = getattr(weight, "main_param", weight)
        if weight.requires_grad:
            state = states[main]
            named |= {f"optimizer.state.{kind}.{name}": state[kind] for kind in ("exp_avg", "exp_avg_sq")}
            if main is not weight:
                named[f"optimizer.state.param.{name}"] = main.detach()
    return {name: tensor.clone() for name, tensor in named.items()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal names and equal bits."""
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    different = [name for name in got if not torch.equal(got[name], expected[name])]
    assert not different


def begin(overrides: tuple[str, ...], run: Path) -> list[tuple[float, float]]:
    """Two steps, a checkpoint that contains exactly the trainer's state, two more steps."""
    with joined(compose_config(*overrides)) as device:
        trainer, step = built(overrides, device)
        for _ in range(2):
            step()
        held = held_by(trainer)
        assert_same(tensors_in(saved(trainer, overrides, run, 2, mean=0.1)), held)
        return [step(), step()]


def pass_on(overrides: tuple[str, ...], run: Path, onward: Path) -> list[tuple[float, float]]:
    """Load, save what was loaded into another run, two more steps."""
    with joined(compose_config(*overrides)) as device:
        trainer, step = built(overrides, device, first=2)
        loaded = restore.load(trainer, latest(run))
        assert (loaded.step, loaded.numbers, loaded.ends) == (2, {"mean": 0.1}, ())
        saved(trainer, overrides, onward, 2, mean=0.1)
        return [step(), step()]
