"""Losses of a small model of each architecture over the same steps, in each precision and in fp32."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

from benchmarks.gpu_parts.sizes import Size, precisions
from benchmarks.gpu_parts.timing import forget
from nvlm.commands.compose import compose_config
from nvlm.data.loader import load_steps
from nvlm.processes import groups
from nvlm.train.loop import build_steps, build_trainer
from nvlm.train.step import train_step

CLOSE = 0.01  # relative difference of the mean losses


def accuracy(arch: str, names: Sequence[str], size: Size) -> Iterator[dict]:
    """Mean losses in those of the precisions `names` that this machine has, compared with fp32."""
    able, _ = precisions(size)
    exact = losses(size, arch, "fp32")
    for name in [name for name in names if name in able]:
        began = time.perf_counter()
        forget()
        got = losses(size, arch, name)
        apart = abs(statistics.mean(got) / statistics.mean(exact) - 1)
        worst = max(abs(a / b - 1) for a, b in zip(got, exact, strict=True))
        yield {
            "arch": arch, "precision": name, "steps": size.steps, "fp32 mean": statistics.mean(exact), "apart": apart,
            "worst step": worst, "right": apart < CLOSE, "losses": got, "fp32": exact,
            "took s": round(time.perf_counter() - began, 1),
        }  # fmt: skip


def losses(size: Size, arch: str, precision: str) -> list[float]:
    """Losses of the first steps of a run."""
    config = compose_config(*size.learner, f"arch={arch}", f"precision={precision}", "seed=7")
    with groups.distributed(config.parallel, config.seed) as device:
        trainer = build_trainer(config, device)
        data = load_steps(build_steps(config), 0, 0)
        return [train_step(trainer, next(data)).loss for _ in range(size.steps)]
