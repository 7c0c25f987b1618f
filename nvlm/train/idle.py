"""Module groups that should learn but cannot: their gradient is exactly zero, or a frozen gate is zero."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel

from nvlm.arch import registry
from nvlm.arch.base import VisionLanguageModel
from nvlm.arch.groups import parameter_group
from nvlm.config.values import GROUPS, Config, problem
from nvlm.processes import device, groups

_STEPS = 10  # with images, before the warning: after a gate that starts at zero, gradients appear in the second step


@dataclass(frozen=True, slots=True)
class Idle:
    """Groups that should learn but had no gradient in the first `steps` steps with images."""

    groups: frozenset[str]
    steps: int = 0


def expected(config: Config) -> Idle:
    """The state at the start of a run: all groups that learn."""
    groups_of_model = ("vision", *registry.description(config.arch.name).groups)
    return Idle(frozenset(config.stage.trainable).intersection(groups_of_model))


def after_step(idle: Idle, chunks: Sequence[DistributedDataParallel], tiles: int) -> tuple[Idle, str | None]:
    """`idle` after a step with so many tiles, and a warning once the groups without a gradient are known.

    The buffers of `chunks` still hold the step's gradients. A collective call.
    """
    if not idle.groups or not tiles or idle.steps == _STEPS:
        return idle, None
    idle = Idle(idle.groups - _with_gradient(chunks), idle.steps + 1)
    return idle, _warning(idle) if idle.groups and idle.steps == _STEPS else None


def _warning(idle: Idle) -> str:
    names = ", ".join(sorted(idle.groups))
    return (
        f"warning: {names}: the gradient was exactly zero in each of the first {idle.steps} steps with images, so "
        f"nothing is learned there. Is a gate closed, or does the loss not depend on the output?"
    )


def check_gates(parts: Iterable[VisionLanguageModel]) -> None:
    """Raise ConfigError if a cross-attention gate is zero and frozen, which hides all tiles from the model."""
    for part in parts:
        for name, parameter in part.named_parameters():
            if name.endswith(".cross_attention.gate") and not parameter.requires_grad and not parameter.any():
                raise problem(
                    part.whole_name(name),
                    "0, and it is frozen, so that the model never sees a tile through it",
                    "gates that learn, or that learned in an earlier stage",
                    "stage.train_xattn=true stage.new=[projector,xattn], or init.checkpoint=RUN of the earlier stage",
                )


@torch.no_grad()
def _with_gradient(chunks: Sequence[DistributedDataParallel]) -> frozenset[str]:
    """Groups with a nonzero gradient on any rank."""
    here = torch.zeros(len(GROUPS), device=device.device())
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                here[GROUPS.index(parameter_group(name))] += parameter.main_grad.any()
    everywhere = groups.sum_over_ranks(here).tolist()
    return frozenset(group for group, found in zip(GROUPS, everywhere) if found)
