"""Sweeps as folders, made up: for tests of reports and for benchmarks/report.py. Nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from nvlm.config.mapping import to_mapping
from nvlm.config.values import Config

KINDS = ("tile", "row", "page", "count")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a made-up run did. `rate`: the share of right answers; `done`: its last step; `evaluated`: steps with an
    evaluation; `names`: ids of its questions."""

    rate: float = 0.8
    done: int = 60
    evaluated: Sequence[int] = (60,)
    names: Sequence[str] = tuple(f"q{number}" for number in range(40))
    loss: float = 1.0
    flops: float = 2e12  # of a step
    seconds: float = 0.5  # of a step
    memory: int | None = 300_000_000


def with_seed(config: Config, seed: int, steps: int = 60) -> Config:
    """`config` with a seed and a length."""
    return replace(config, seed=seed, train=replace(config.train, steps=steps))


def write_run(folder: Path, config: Config, made: Made, answers: Sequence[Mapping] | None = None) -> Path:
    """A run's folder; `answers`: lines of answers.jsonl, instead of made-up ones."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_mapping(config))))
    (folder / "environment.json").write_text(json.dumps({"git_commit": "0123456789abcdef", "packages": {}}))
    write_metrics(folder / "metrics.jsonl", config, made)
    for step in made.evaluated:
        share = step / config.train.steps
        rows = answers if answers is not None else answered(made, config.seed, made.rate * share)
        write_evaluation(folder / "evaluation" / "heldout" / f"step_{step}", rows, step)
    return folder


def write_metrics(path: Path, config: Config, made: Made) -> None:
    """metrics.jsonl up to the step `made.done`."""
    rng, lines = np.random.default_rng(config.seed), []
    for step in range(1, made.done + 1):
        loss = made.loss * (1 + 3 * np.exp(-4 * step / config.train.steps) + rng.normal(0, 0.05))
        tokens, tiles = 3000 + int(rng.integers(200)), 160
        row = {
            "step": step, "loss": loss, "records": config.train.global_batch, "updated": True, "lr": 1e-3,
            "tokens": tokens, "tiles": tiles, "tokens_per_second": tokens / made.seconds,
            "tiles_per_second": tiles / made.seconds, "tflops": made.flops / made.seconds / 1e12,
            "seconds": made.seconds,
        }  # fmt: skip
        lines.append(json.dumps(row | ({"peak_memory": made.memory} if made.memory else {})) + "\n")
    path.write_text("".join(lines))


def answered(made: Made, seed: int, rate: float) -> list[dict]:
    """Lines of answers.jsonl: of all questions, about `rate` right."""
    rng = np.random.default_rng([seed, int(1000 * rate)])
    return [
        {
            "id": name,
            "question": "What stands there?",
            "answer": "7" if right else "1",
            "references": ["7"],
            "score": float(right),
            "category": KINDS[number % len(KINDS)],
            "tiles": number % 6 + 1,
        }
        for number, (name, right) in enumerate(zip(made.names, rng.random(len(made.names)) < rate))
    ]


def write_evaluation(folder: Path, rows: Sequence[Mapping], step: int) -> None:
    """answers.jsonl and score.json."""
    folder.mkdir(parents=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = sorted({row["category"] for row in rows})
    score = {"task": "heldout", "metric": "exact_match", "step": step, "checkpoint": f"step_{step}", "unanswered": []}
    score |= _mean(rows) | {"by_category": {kind: _mean([r for r in rows if r["category"] == kind]) for kind in kinds}}
    (folder / "score.json").write_text(json.dumps(score))


def _mean(rows: Sequence[Mapping]) -> dict:
    mean = float(np.mean([row["score"] for row in rows]))
    return {"mean": mean, "low": mean, "high": mean, "count": len(rows)}
