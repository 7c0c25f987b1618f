"""Module groups that should learn and do not: their gradient is exactly zero, or the gate in front of them is shut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel

from nvlm.arch.base import VisionLanguageModel, parameter_group
from nvlm.config.values import GROUPS, Config, problem
from nvlm.processes import device, groups

_STEPS = 10  # with images, before a group without a gradient is named: behind a fresh gate it takes two


@dataclass(frozen=True, slots=True)
class Idle:
    """Groups that learn but have had no gradient in the first `steps` steps with images."""

    groups: frozenset[str]
    steps: int = 0


def expected(config: Config) -> Idle:
    """What a run begins with: all groups that learn."""
    absent = {"xattn"} if config.arch.name == "decoder" else set()
    return Idle(frozenset(config.stage.trainable) - absent)


def after_step(idle: Idle, chunks: Sequence[DistributedDataParallel], tiles: int) -> tuple[Idle, str | None]:
    """`idle` behind a step with so many tiles, whose gradients the buffers of `chunks` still hold; and what to say of
    groups that have had no gradient by now.

    All processes call it together.
    """
    if not idle.groups or not tiles or idle.steps == _STEPS:
        return idle, None
    idle = Idle(idle.groups - _with_gradient(chunks), idle.steps + 1)
    return idle, _warning(idle) if idle.groups and idle.steps == _STEPS else None


def _warning(idle: Idle) -> str:
    names = ", ".join(sorted(idle.groups))
    return (
        f"warning: {names}: the gradient was exactly zero in each of the first {idle.steps} steps with images, so "
        f"nothing is learned there. Is what it feeds frozen, or out of reach of the loss?"
    )


def check_gates(parts: Iterable[VisionLanguageModel]) -> None:
    """Raise ConfigError where a gate of cross-attention is zero and does not learn: tiles behind it are never seen."""
    for part in parts:
        for name, parameter in part.named_parameters():
            if name.endswith(".cross_attention.gate") and not parameter.requires_grad and not parameter.any():
                raise problem(
                    part.whole_name(name),
                    "0, and it does not learn, so that no tile behind it is ever seen",
                    "gates that learn, or that have learned in the stage before",
                    "stage.train_xattn=true stage.new=[projector,xattn], or init.checkpoint=RUN of the stage before",
                )


@torch.no_grad()
def _with_gradient(chunks: Sequence[DistributedDataParallel]) -> frozenset[str]:
    """Groups with a gradient that is not zero, on any process."""
    here = torch.zeros(len(GROUPS), device=device.device())
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                here[GROUPS.index(parameter_group(name))] += parameter.main_grad.any()
    everywhere = groups.sum_over_ranks(here).tolist()
    return frozenset(group for group, found in zip(GROUPS, everywhere) if found)
