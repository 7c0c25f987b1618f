"""Refuses a run that cannot fit in memory before anything is loaded, and suggests the smallest change that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nvlm.config.rules import check_world, validate
from nvlm.config.values import Config, ConfigError
from nvlm.estimate.memory import gib, least_memory


def check_memory(config: Config, processes: int, gpu: str, capacity: int) -> None:
    """Raise ConfigError if `processes` GPUs of `capacity` bytes, named `gpu`, cannot fit a run of `config`.

    The least that a run needs is compared: full rows of text without an image.
    """
    replicas = max(1, processes // config.parallel.replica)
    needed = least_memory(config, replicas)
    if needed.total <= capacity:
        return
    gpus = config.parallel.replica * replicas
    raise ConfigError(
        f"memory: got {gib(needed.total)} a GPU on {gpus} GPUs ({needed.parts}; images not counted), expected at most "
        f"{gib(capacity)} of {gpu}. Fix: {_fix(config, gpus, capacity)}; "
        f"python launch/plan.py gpus={gpus}{f' gpu={config.gpu}' if config.gpu else ''} with this run's keys lists all "
        f"layouts that fit"
    )


def _fix(config: Config, gpus: int, capacity: int) -> str:
    """The first of several changes that is enough, as command-line words."""
    for words, changed, number in _changes(config, gpus):
        try:
            replicas = check_world(validate(changed), number)
        except ConfigError:
            continue
        needed = least_memory(changed, replicas).total
        if needed <= capacity:
            on = f" on {number} GPUs" if number != gpus else ""
            return f"{words}{on} ({gib(needed)})"
    return "more GPUs and more shards of the model"


def _changes(config: Config, gpus: int) -> Iterator[tuple[str, Config, int]]:
    """(command-line words, configuration, GPUs), cheapest change first."""
    p = config.parallel
    if gpus > p.tensor * p.pipeline and not p.distributed_optimizer:
        sharded = replace(config, parallel=replace(p, distributed_optimizer=True))
        yield "parallel.distributed_optimizer=true", sharded, gpus
    for recompute in ("selective", "full"):
        train = replace(config.train, recompute=recompute, offload=False)
        yield f"train.recompute={recompute}", replace(config, train=train), gpus
    for times in (2, 4, 8):
        for name in ("tensor", "pipeline"):
            sizes = {name: times * getattr(p, name)} | ({"sequence": True} if name == "tensor" else {})
            words = " ".join(f"parallel.{key}={str(value).lower()}" for key, value in sizes.items())
            laid = replace(config, parallel=replace(p, **sizes, distributed_optimizer=True))
            yield words, laid, gpus
            yield f"{words} train.recompute=full", replace(laid, train=replace(laid.train, recompute="full")), gpus
    for times in (2, 4, 8, 16, 32):
        yield "the same layout", config, times * gpus
    for times in (2, 4, 8):
        pipeline = times * p.pipeline
        laid = replace(config, parallel=replace(p, pipeline=pipeline, distributed_optimizer=True))
        for more in (2, 4, 8, 16):
            yield f"parallel.pipeline={pipeline}", laid, more * gpus
