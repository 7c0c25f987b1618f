"""Small whole runs, each in its own folder, and the files that they wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.e2e import preloaded

ROOT = Path(__file__).resolve().parents[2]

SMALL = [
    "precision=fp32", "data.records=48", "data.workers=0", "train.global_batch=4", "llm.layers=4",
    "llm.cross_every=2", "train.threads=1",
    "optim.warmup=2", "evaluate.questions=0", "train.steps=6", "train.save_every=3",
]  # fmt: skip


def command(*overrides):
    flags = [word for word in overrides if word.startswith("-")]  # Hydra wants its flags before all overrides
    words = [word for word in overrides if not word.startswith("-")]
    return [sys.executable, str(ROOT / "launch" / "train.py"), *flags, *SMALL, *words]


def train(where: Path, *overrides, check=True) -> subprocess.CompletedProcess:
    """A whole run in `where`, forked with its imports done; its output is in both stdout and stderr."""
    flags = [word for word in overrides if word.startswith("-")]
    words = [word for word in overrides if not word.startswith("-")]
    status, output = preloaded.run(where, *flags, *SMALL, *words, timeout=240)
    assert not check or status == 0, output
    return subprocess.CompletedProcess(words, status, output, output)


def rows(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path):
    return [row["loss"] for row in rows(run)]
