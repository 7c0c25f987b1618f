"""A finished run is extended and finished again."""

from __future__ import annotations

import math

import pytest

from tests.e2e.faults import SMALL, losses, rows
from tests.e2e.preloaded import run

WINDOW = ["data.window=4", "train.save_every=3", "train.keep=9"]


def cosine(step: int, steps: int, lr: float = 3e-3, least: float = 0.0, warmup: int = 2) -> float:
    """The learning rate of `step` (from 1) in a run of `steps`."""
    if step - 1 <= warmup:
        return lr * (step - 1) / warmup
    return least + (lr - least) * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup))) / 2


def test_a_run_goes_on_to_a_later_end(tmp_path, configured):
    config = configured(*SMALL)
    rate = {"lr": config.optim.lr, "least": config.optim.min_lr}
    status, output = run(tmp_path, *SMALL, *WINDOW, "train.steps=6", "resume=auto")
    assert status == 0 and f"no checkpoint in {tmp_path}/runs/run: starting at step 0" in output, output
    short = losses(tmp_path)
    longer = [*SMALL, *WINDOW, "train.steps=11", "resume=auto"]
    status, output = run(tmp_path, *longer)
    assert status == 0 and "resuming from step 6 of 11: " in output, output
    said = f"{cosine(7, 11, **rate):.3g} instead of {cosine(7, 6, **rate):.3g} at step 7"
    assert "extended from 6 to 11 steps: " in output and said in output
    long = losses(tmp_path)
    assert long[:6] == short and len(long) == 11
    expected = [cosine(step, 6 if step <= 6 else 11, **rate) for step in range(1, 12)]
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    # The checkpoint knows the end that the run had, in the middle of a window.
    (tmp_path / "runs" / "run" / "checkpoints" / "latest").write_text("step_00000009\n")
    status, output = run(tmp_path, *longer)
    assert status == 0 and "made longer" not in output and losses(tmp_path) == long, output
    status, output = run(tmp_path, *longer)
    assert status == 0 and output == f"{tmp_path}/runs/run is done: 11 of 11 steps\n"
