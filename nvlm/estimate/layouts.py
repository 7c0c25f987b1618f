"""All layouts for a number of GPUs: those that fit, fastest first, and why the others are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nvlm.config.hardware import GPU
from nvlm.config.rules import check_world, validate
from nvlm.config.values import Config, ConfigError
from nvlm.estimate.load import Load, step_load
from nvlm.estimate.memory import Memory, gib, memory
from nvlm.estimate.speed import Speed, bubble_share, speed

TENSOR = (1, 2, 4, 8, 16)
MOST_STAGES = 64  # including virtual ones: beyond this, a stage has only a layer or two


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A layout that the rules allow, with its predicted memory and speed."""

    config: Config
    replicas: int
    load: Load
    memory: Memory
    speed: Speed | None  # None if it does not fit

    @property
    def gpus(self) -> int:
        """Number of GPUs of all replicas."""
        return self.replicas * self.config.parallel.replica

    @property
    def samples_per_second(self) -> float:
        """Throughput of the whole run."""
        return self.load.samples * self.replicas / self.speed.step

    @property
    def bubble(self) -> float:
        """Ratio of idle to busy time in the pipeline."""
        return bubble_share(self.config, self.load.micro_batches)

    def mfu(self, gpu: GPU) -> float:
        """Model FLOPs utilisation: share of the GPUs' peak in the run's precision."""
        return self.speed.flops / self.speed.step / (self.gpus * gpu.peak(self.config.precision.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why some layouts cannot run."""

    reason: str
    layouts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All layouts for `gpus` GPUs. `fitting`: fastest first. `nearest`: the smallest of those that do not fit."""

    gpus: int
    gpu: GPU
    fitting: tuple[Option, ...]
    nearest: Option | None
    refused: tuple[Refusal, ...]


def plan(
    config: Config,
    gpus: int,
    gpu: GPU,
    fixed: Sequence[str] = (),
    tiles: int | None = None,
    text: int | None = None,
    frames: int = 0,
) -> Plan:
    """Try all layouts. `fixed`: keys (parallel.tensor, train.recompute, ...) that keep their values in `config`.

    `tiles`, `text`, `frames`: as in `step_load`.
    """
    fitting, large, refused = [], [], {}
    for candidate in candidates(config, gpus, fixed):
        try:
            replicas = check_world(validate(candidate), gpus)
        except ConfigError as error:
            reason = str(error).partition(". Fix: ")[0]
            # Reasons that differ only in numbers are merged.
            refused.setdefault(re.sub(r"\d+", "", reason), (reason, []))[1].append(name(candidate))
            continue
        load = step_load(candidate, replicas, tiles, text, frames)
        needed = memory(candidate, replicas, load)
        fits = needed.total <= gpu.memory
        found = Option(
            config=candidate,
            replicas=replicas,
            load=load,
            memory=needed,
            speed=speed(candidate, replicas, gpu, load) if fits else None,
        )
        (fitting if fits else large).append(found)
    return Plan(
        gpus=gpus,
        gpu=gpu,
        fitting=tuple(sorted(fitting, key=lambda option: -option.samples_per_second)),
        nearest=min(large, key=lambda option: option.memory.total, default=None),
        refused=tuple(Refusal(reason=why, layouts=tuple(dict.fromkeys(names))) for why, names in refused.values())
        + _too_large(large, gpu),
    )


def best_by_cut(fitting: Sequence[Option]) -> list[Option]:
    """The fastest layout of each tensor x pipeline x context; others differ only in recomputation or virtual stages."""
    found: dict[tuple[int, ...], Option] = {}
    for option in fitting:
        p = option.config.parallel
        found.setdefault((p.tensor, p.pipeline, p.context), option)
    return list(found.values())


def name(config: Config) -> str:
    """A short name of a layout."""
    p = config.parallel
    parts = [f"tensor {p.tensor}", f"pipeline {p.pipeline}"]
    parts += [f"virtual {p.virtual}"] if p.virtual > 1 else []
    heads = f" ({p.context_heads} over heads)" if p.context_heads > 1 else ""
    parts += [f"context {p.context}{heads}"] if p.context > 1 else []
    return " x ".join(parts)


def overrides(config: Config, replicas: int) -> str:
    """The command-line overrides that select the layout, whatever else the command line and its experiment set."""
    p = config.parallel
    values = {
        "parallel.tensor": p.tensor,
        "parallel.sequence": str(p.sequence).lower(),
        "parallel.pipeline": p.pipeline,
        "parallel.virtual": p.virtual,
        "parallel.context": p.context,
        "parallel.context_heads": p.context_heads,
        "parallel.data": replicas,
        "parallel.distributed_optimizer": str(p.distributed_optimizer).lower(),
        "parallel.gradients": p.gradients,
        "train.recompute": config.train.recompute,
    }
    return " ".join(f"{key}={value}" for key, value in values.items())


def candidates(config: Config, gpus: int, fixed: Sequence[str]) -> Iterator[Config]:
    """Layouts to try, before the rules are checked: sizes whose product divides `gpus`, and kinds of recomputation."""

    def choices(key: str, values: Sequence) -> Sequence:
        return (getattr(config.parallel, key),) if f"parallel.{key}" in fixed else values

    layers, asked = config.llm.layers, {f"parallel.{size}" for size in ("tensor", "pipeline", "context")} & set(fixed)
    recomputes = (config.train.recompute,) if "train.recompute" in fixed else ("none", "selective", "full")
    for tensor in choices("tensor", TENSOR):
        for pipeline in choices("pipeline", _divisors(layers, MOST_STAGES)):
            for context in choices("context", _powers_of_two(gpus)):
                if gpus % (tensor * pipeline * context) and not asked:  # sizes set by the user are not skipped silently
                    continue
                virtuals = _divisors(layers // math.gcd(layers, pipeline), MOST_STAGES // pipeline)
                for virtual in choices("virtual", virtuals if pipeline > 1 else (1,)):
                    for heads in choices("context_heads", sorted({1, context})):
                        parallel = replace(
                            config.parallel,
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual=virtual,
                            context=context,
                            context_heads=heads,
                            sequence=choices("sequence", (tensor > 1,))[0],
                            distributed_optimizer=choices("distributed_optimizer", (True,))[0],
                        )
                        for recompute in recomputes:
                            train = replace(config.train, recompute=recompute)
                            yield replace(config, parallel=parallel, train=train)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _powers_of_two(most: int) -> list[int]:
    return [2**n for n in range(4) if 2**n <= most]


def _too_large(large: Sequence[Option], gpu: GPU) -> tuple[Refusal, ...]:
    """One refusal for each split of the weights."""
    by_cut: dict[tuple[int, int], list[Option]] = {}
    for option in large:
        p = option.config.parallel
        by_cut.setdefault((p.tensor, p.pipeline), []).append(option)
    found = []
    for (tensor, pipeline), options in sorted(by_cut.items()):
        best = min(options, key=lambda option: option.memory.total)
        reason = (
            f"memory, tensor {tensor} x pipeline {pipeline}: at least {gib(best.memory.total)}, more than "
            f"{gib(gpu.memory)}; {best.memory.largest} alone {gib(getattr(best.memory, best.memory.largest))}"
        )
        found.append(Refusal(reason=reason, layouts=tuple(dict.fromkeys(name(option.config) for option in options))))
    return tuple(found)
