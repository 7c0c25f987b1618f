"""Forward and backward of NVLM-D, -X and -H: time, FLOP/s, memory, and time by kernel."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import torch

from benchmarks.gpu_parts import trace
from benchmarks.gpu_parts.sizes import Size, a_row
from benchmarks.gpu_parts.timing import forget, timed
from nvlm.arch.pipeline import build_parts, build_pipeline, tile_use_of_rank
from nvlm.attention.choice import kernels_of
from nvlm.commands.compose import compose_config
from nvlm.config.hardware import known_gpu
from nvlm.config.values import Config
from nvlm.data.batch import Batch, Sample
from nvlm.data.pack import collate
from nvlm.data.work import count_work
from nvlm.estimate.flops import model_flops
from nvlm.estimate.load import Load, batch_load
from nvlm.estimate.memory import memory
from nvlm.estimate.speed import speed
from nvlm.llm import backend
from nvlm.processes import groups
from nvlm.processes.device import has_cuda
from nvlm.train.optim import freeze, wrap
from nvlm.train.step import Trainer, forward_backward
from nvlm.vision.encoders.registry import description_of
from nvlm.vision.path import frozen, solo_groups
from nvlm.vision.prepass import BalancedVision, build_team


def steps(arch: str, how: str, size: Size) -> Iterator[dict]:
    """A row for each number of tiles, and where the time of the first one goes.

    `how`: a precision; `-torch` behind it leaves Transformer Engine out, `-encoder` has the encoder in FP8 as well, and
    `+N` makes rows of up to N tokens.
    """
    how, _, length = how.partition("+")
    precision, *options = how.split("-")
    with without_engine() if "torch" in options else contextlib.nullcontext():
        encoder = ("precision.encoder=true",) if "encoder" in options else ()
        config = compose_config(*size.overrides, f"arch={arch}", f"precision={precision}", *encoder)
        began = time.perf_counter()
        with learner(config) as trainer:
            built = {"row": int(length or size.rows[arch]), "built s": round(time.perf_counter() - began, 1)}
            for tiles in size.tiles:
                samples, row = fitting(config, a_row(config, tiles, size.text, built["row"]), trainer, size)
                yield {"arch": arch, "precision": how, "tiles": tiles} | row | built
                if tiles == size.tiles[0]:
                    told = traced(step_of(config, samples, size), trainer)
                    yield {"arch": arch, "precision": how, "tiles": tiles} | told
            del trainer  # else the next model would be built beside this one


def fitting(config: Config, samples: Sequence[Sample], trainer: Trainer, size: Size) -> tuple[Sequence[Sample], dict]:
    """As many of the samples as fit into memory in one row, and what was measured with them.

    Raises torch.OutOfMemoryError if not even one does.
    """
    for count in range(len(samples), 1, -1):
        with contextlib.suppress(torch.OutOfMemoryError):
            return samples[:count], measured(config, step_of(config, samples[:count], size), trainer, size.repeats)
        print(f"out of memory with {count} samples a row", flush=True)
        forget()
    return samples[:1], measured(config, step_of(config, samples[:1], size), trainer, size.repeats)


def without_engine() -> contextlib.AbstractContextManager:
    """A block that computes as if Transformer Engine were not installed."""
    return patch.object(backend, "why_not_te", lambda: "left out by the benchmark")


@contextlib.contextmanager
def learner(config: Config) -> Iterator[Trainer]:
    """A trainer of `config` with random weights and gradient buffers, without an optimizer."""
    with groups.distributed(config.parallel, config.seed) as device:
        backend.check_precision(config)
        parts = [part.to(device) for part in build_parts(config)]
        for part in parts:
            freeze(part, config)
        stages = build_pipeline(config, parts)
        chunks = tuple(wrap(part, config) for part in parts)
        parts[0].config.finalize_model_grads_func = stages.finalize
        fresh = replace(config, init=replace(config.init, vision=None))
        encoder = description_of(config.vision).build(fresh, solo_groups()).to(device)
        path = frozen(encoder, replace(fresh, vision=replace(config.vision, graph=False)))
        vision = BalancedVision(path, build_team(tile_use_of_rank(config, 0), config.vision.balance))
        yield Trainer(chunks, None, stages, vision, SimpleNamespace(zero_grad=lambda: None), None, device, {})


def one_batch(config: Config, samples: Sequence[Sample]) -> Batch:
    """A micro-batch of one row."""
    return collate([samples], config.vision.tile_size, config.row_multiple)


def step_of(config: Config, samples: Sequence[Sample], size: Size) -> list[Batch]:
    """The micro-batches of a timed step: the same row several times, in page-locked memory as the loader leaves it."""
    batch = one_batch(config, samples)
    return [batch.pin_memory() if has_cuda() else batch] * size.micro_batches


def measured(config: Config, batches: Sequence[Batch], trainer: Trainer, repeats: int) -> dict:
    """A step of these micro-batches, which are equal."""
    cuda = trainer.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    seconds = timed(lambda: forward_backward(trainer, batches), repeats, warm_up=1)  # of several micro-batches
    batch, count = batches[0], len(batches)
    load = load_of(batch, count)
    samples, flops = load.samples, count * model_flops(config, load.work).total / seconds
    row = {
        "engine": "TE" if backend.uses_te(config) else "torch", "samples": samples, "micro-batches": count,
        "tokens": count * batch.num_tokens, "keys": count * load.keys, "ms": 1e3 * seconds,
        "samples/s": samples / seconds, "TFLOP/s": flops / 1e12, "took s": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    return row | (_on_gpu(config, load, seconds, flops) if cuda else {})


def traced(batches: Sequence[Batch], trainer: Trainer) -> dict:
    """The same step's time by kernel."""
    return trace.by_kernel(lambda: forward_backward(trainer, batches))


def load_of(batch: Batch, count: int) -> Load:
    """The planner's load of a step of `count` micro-batches like this one."""
    load = batch_load(batch, count_work(batch))
    return replace(load, micro_batches=count, samples=count * load.samples)


def _on_gpu(config: Config, load: Load, seconds: float, flops: float) -> dict:
    """What a GPU adds: MFU, the peak of allocated memory, and the planner's memory and time over the measured ones."""
    gpu, peak = known_gpu(torch.cuda.get_device_name()), torch.cuda.max_memory_allocated()
    planned = memory(config, 1, load, kernels_of(config, backend.this_machine()))
    row = {"peak GB": peak / 1e9, "planned memory": (planned.allocated - planned.optimizer) / peak}
    if gpu is None:
        return row
    foretold = speed(config, 1, gpu, load)
    planned_time = (foretold.step - foretold.optimizer) / seconds
    return {"MFU": flops / gpu.peak(config.precision.name), **row, "planned time": planned_time}
