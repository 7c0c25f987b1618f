"""What learns and how fast: freezing by module group, Megatron's DDP, optimizer and schedule."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from nvlm.arch.base import VisionLanguageModel
from nvlm.arch.groups import parameter_group
from nvlm.config.values import GROUPS, Config
from nvlm.llm.build import DTYPES
from nvlm.processes.groups import gather_over_ranks
from nvlm.train.reduce import BUCKET, send_in_bf16
from nvlm.weights.merge import is_adapter


@dataclass(frozen=True, slots=True)
class GroupCount:
    """Parameters of one module group of the whole model."""

    name: str
    parameters: int
    learning: int  # how many learn: all, none, or those in adapters


def freeze(model: VisionLanguageModel, config: Config) -> None:
    """Freeze all but the groups that the stage trains; in groups with adapters, all but the adapters.

    Call it before the DDP wrap, which allocates gradient buffers only for what learns.
    """
    for name, parameter in model.named_parameters():
        group = parameter_group(name)
        parameter.requires_grad_(group in config.stage.trainable and (group not in config.adapted or is_adapter(name)))


def count_groups(parts: Sequence[VisionLanguageModel], encoder: torch.nn.Module) -> list[GroupCount]:
    """Parameters of the whole model by module group, and how many of them learn. A collective call."""
    own: Counter = Counter()
    for part in parts:
        for name, parameter in part.named_parameters():
            if getattr(parameter, "copy_number", 0) == 0:
                group, learns = parameter_group(name), parameter.requires_grad
                own[group, learns] += parameter.numel() * _shards(parameter)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Counter] = [Counter()] * pipeline.size()
    dist.all_gather_object(stages, own, group=pipeline)
    total = sum(stages, Counter())
    for parameter in encoder.parameters():
        total["vision", parameter.requires_grad] += parameter.numel()
    return [GroupCount(group, total[group, True] + total[group, False], total[group, True]) for group in GROUPS]


def _shards(parameter: torch.nn.Parameter) -> int:
    """Number of tensor-parallel ranks that the parameter is split over."""
    split = getattr(parameter, "tensor_model_parallel", False)
    return parallel_state.get_tensor_model_parallel_world_size() if split else 1


def wrap(model: VisionLanguageModel, config: Config) -> DistributedDataParallel:
    """The model in Megatron's DDP, with fp32 gradients of the sum of all losses."""
    overlap, in_bf16 = config.parallel.overlap, config.gradients_in_bf16
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        bucket_size=BUCKET if in_bf16 and overlap else None,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        check_for_nan_in_grad=False,  # train_step checks the norm
        fp8_param_gather=config.precision.param_gather,
    )
    keeps_fp8 = model.config.fp8 and (config.precision.param_gather or config.adapted)
    if keeps_fp8:
        from nvlm.llm.fp8 import keep_in_fp8

        keep_in_fp8(model.decoder, trained=config.precision.param_gather)
    wrapped = DistributedDataParallel(config=model.config, ddp_config=ddp_config, module=model)
    if in_bf16:
        send_in_bf16(wrapped)
    if not keeps_fp8:  # FP8 tensors cannot be broadcast; replicas start with equal weights anyway
        wrapped.broadcast_params()
    return wrapped


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    config: Config,
    encoder: DistributedDataParallel | None = None,
    groups: ProcessGroupCollection | None = None,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW for the parameters that learn; linear warm-up and cosine decay, in steps.

    `encoder`: one that learns, with its `groups`. The norm that clips is that of all gradients.
    """
    optim, settings = config.optim, _settings(config)
    build = functools.partial(
        get_megatron_optimizer, settings, config_overrides=_overrides(config, settings), use_gloo_process_groups=False
    )
    optimizer = build(list(chunks))
    if encoder is not None:
        parts = (optimizer, build([encoder], pg_collection=groups))
        optimizer = ChainedOptimizer([one for part in parts for one in part.chained_optimizers])
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup,
        lr_decay_steps=config.train.steps,
        lr_decay_style="cosine",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=config.train.steps,
        wd_incr_style="constant",
    )
    return optimizer, schedule


def _settings(config: Config) -> OptimizerConfig:
    optim, dtype = config.optim, DTYPES[config.precision.dtype]
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap,
        fp8_recipe=config.precision.recipe if config.precision.param_gather else None,
    )


def _overrides(config: Config, settings: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's own, no weight decay for biases and norms, and the learning rates of optim.lr_of."""
    found = get_standard_config_overrides(settings)
    for group in GROUPS:
        if getattr(config.optim.lr_of, group) is not None:
            peak, lowest = config.optim.rates(group)
            of_group = ParamWithNamePredicate(name=group, fn=functools.partial(_belongs, group))
            found[ParamKey(with_name_predicate=of_group)] = ParamGroupOverride(max_lr=peak, min_lr=lowest)
    return found


def _belongs(group: str, parameter: torch.nn.Parameter, name: str) -> bool:
    return parameter_group(name.removeprefix("module.")) == group  # DDP's name of the model


def peak_rates(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> dict[str, float]:
    """The highest learning rate of each module group that learns, as the optimizers' own groups have it. A collective
    call."""
    rates: dict[torch.nn.Parameter, float] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        rates |= _rates_in(part) if part.optimizer is not None else {}
    own: dict[str, set[float]] = {}
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            rate = rates.get(parameter, rates.get(getattr(parameter, "main_param", None)))
            if rate is not None:
                own.setdefault(parameter_group(name), set()).add(rate)
    every = gather_over_ranks(list(own.items()))
    found = {group: set().union(*(some for name, some in every if name == group)) for group, _ in every}
    assert all(len(some) == 1 for some in found.values()), f"several learning rates in one module group: {found}"
    return {group: some.pop() for group, some in found.items()}


def _rates_in(part: MegatronOptimizer) -> dict[torch.nn.Parameter, float]:
    """The highest rate of each weight that `part` updates on this rank; a plain optimizer has its fp32 copy."""
    groups = part.optimizer.param_groups
    if isinstance(part, DistributedOptimizer):
        return {weight: groups[number]["max_lr"] for weight, (number, _) in part.model_param_group_index_map.items()}
    return {weight: group["max_lr"] for group in groups for weight in group["params"]}


def take_up(schedule: OptimizerParamScheduler, kept: dict) -> tuple[float, float]:
    """Continue the schedule whose state is `kept`, over this run's number of steps.

    Returns the next step's learning rate under the old schedule and under the new one: an extended run follows the
    cosine of its new length from here on, as with Megatron's --override-opt_param-scheduler.
    """
    steps = schedule.lr_decay_steps
    schedule.load_state_dict(kept)
    before = schedule.get_lr({})
    schedule.lr_decay_steps = schedule.wd_incr_steps = steps
    schedule.step(increment=0)
    return before, schedule.get_lr({})


def prepare(optimizer: MegatronOptimizer) -> float:
    """Prepare the gradients of the sum of all losses for an `update`, which may be omitted; returns their norm over
    all ranks."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update(optimizer: MegatronOptimizer, grad_norm: float, tokens: int) -> None:
    """Divide the prepared gradients, whose norm is `grad_norm`, by the number of trained tokens, clip them, and update
    the weights.

    Megatron's step() clips and does `prepare` in one call, which leaves no room to refuse the update. It also divides
    the whole buffer on every rank; here one pass over this rank's shard does both.
    """
    gradients = [parameter.grad for parameter in optimizer.get_parameters() if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, _factor(optimizer.config.clip_grad, grad_norm, tokens))
    optimizer.step_with_ready_grads()


def _factor(clip: float, grad_norm: float, tokens: int) -> float:
    """Factor from gradients of a sum over `tokens`, of norm `grad_norm`, to those of the mean, of norm `clip` at most.

    `clip`: 0 for no limit. As in torch.nn.utils.clip_grad_norm_, 1e-6 is added to the norm.
    """
    return min(1.0, clip / (grad_norm / tokens + 1e-6)) / tokens if clip > 0 else 1 / tokens
