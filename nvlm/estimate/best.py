"""The best layout of a run for a number of GPUs, and why: what `parallel=auto` takes."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.config.hardware import GPU
from nvlm.config.rules import check_world, validate
from nvlm.config.values import Config, ConfigError, problem
from nvlm.estimate.layouts import Option, Plan, best_by_cut, candidates, name, overrides, plan
from nvlm.estimate.load import step_load
from nvlm.estimate.memory import gib, memory

_MUCH = 0.02  # of a step
_TIMES = (2, 4, 8, 16, 32, 64)  # as many GPUs, for the first number that is enough


def best_layout(config: Config, gpus: int, gpu: GPU, fixed: Sequence[str]) -> Plan:
    """All layouts of `gpus` GPUs, the best first. Raises ConfigError if there is none; `fixed` is as in `plan`."""
    if gpu.peak(config.precision.name) is None:
        raise problem(f"precision={config.precision.name}", "a GPU without FP8", "a GPU with FP8", "precision=bf16")
    found = plan(config, gpus, gpu, fixed)
    if found.fitting:
        return found
    if found.nearest is None:
        for candidate in candidates(config, gpus, fixed):
            check_world(validate(candidate), gpus)
        raise problem("parallel=auto", f"{gpus} GPUs", "a number that sizes of a layout can divide", "other sizes")
    near = found.nearest
    expected = (
        f"{gib(near.memory.total)} a GPU, which the smallest layout ({name(near.config)}, train.recompute="
        f"{near.config.train.recompute}) needs"
    )
    enough = next((times * gpus for times in _TIMES if _fits(config, times * gpus, gpu, fixed)), None)
    fix = f"{enough} GPUs (in a dry run: gpus={enough})" if enough else "a smaller model, or GPUs with more memory"
    raise problem("parallel=auto", f"{gpus} GPUs of {gib(gpu.memory)}", expected, fix)


def why(found: Plan, kind: str) -> str:
    """What was chosen and why, in two lines. `kind`: the GPU's name."""
    best, *others = best_by_cut(found.fitting)
    next_best = f"; next best: {name(others[0].config)}, {others[0].samples_per_second:.1f}" if others else ""
    recompute = best.config.train.recompute
    return (
        f"{name(best.config)}, recompute {recompute}, {best.replicas} replicas on {found.gpus} {kind}: "
        f"{best.samples_per_second:.1f} samples/s predicted (MFU {best.mfu(found.gpu):.0%}), "
        f"{gib(best.memory.total)} of {gib(found.gpu.memory)}; the fastest of {len(found.fitting)} layouts that fit"
        f"{next_best}\n  the same in words: {overrides(best.config, best.replicas)}"
    )


def waiting(option: Option) -> str | None:
    """A line about a layout whose GPUs often wait for the host, with rows that help; None if they do not."""
    share, data = option.speed.host / option.speed.step, option.config.data
    if share < _MUCH:
        return None
    words = f"data.row_length={4 * max(data.row_length, data.seq_length)}"
    words += f" data.cross_length={4 * data.cross_length}" if data.cross_length else ""
    return f"GPUs wait {share:.0%} of a step for the host to launch kernels for short rows: {words} fills them better"


def _fits(config: Config, gpus: int, gpu: GPU, fixed: Sequence[str]) -> bool:
    """Whether a layout of `gpus` GPUs fits."""
    return any(_needed(candidate, gpus) <= gpu.memory for candidate in candidates(config, gpus, fixed))


def _needed(candidate: Config, gpus: int) -> float:
    """Bytes that a layout needs on a GPU; infinite if the rules do not allow it."""
    try:
        replicas = check_world(validate(candidate), gpus)
    except ConfigError:
        return float("inf")
    return memory(candidate, replicas, step_load(candidate, replicas)).total
