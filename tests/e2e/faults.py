"""A small run called `run` that tests disturb, and the files that it wrote."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from nvlm.data.loader import Steps
from nvlm.train import loop

SMALL = (
    "precision=fp32 data.records=48 data.workers=0 train.global_batch=4 tiling.max_tiles=2 "
    "llm.layers=1 llm.cross_every=1 train.threads=1 "
    "optim.warmup=2 evaluate.questions=0 train.steps=8 train.save_every=100 name=run"
).split()
TWO = ["parallel.data=2", "parallel.distributed_optimizer=true"]


def rows(where: Path) -> list[dict]:
    return [json.loads(line) for line in (where / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]


def losses(where: Path) -> list[float]:
    return [row["loss"] for row in rows(where)]


def latest(where: Path) -> int | None:
    """The step of the last checkpoint."""
    mark = where / "runs" / "run" / "checkpoints" / "latest"
    return int(mark.read_text().removeprefix("step_")) if mark.is_file() else None


def replace_steps(kind) -> None:
    """Make the loop take its data from a `kind` of Steps."""
    build = loop.build_steps
    loop.build_steps = lambda config: kind(
        **{f.name: getattr(build(config), f.name) for f in dataclasses.fields(Steps)}
    )
