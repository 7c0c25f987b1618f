"""What learns besides adapters when the language model has never seen an image, and the message when nothing does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nvlm.arch.pipeline import next_logits
from nvlm.attention.cache import generating
from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.data.batch import Batch
from nvlm.data.loader import load_steps
from nvlm.train import idle
from nvlm.train.loop import build_steps, build_trainer
from nvlm.train.step import Trainer, train_step
from tests.dist.run import joined, run_distributed

SMALL = (
    "data.records=32", "data.workers=0", "train.global_batch=8", "train.micro_batch=8", "llm.layers=2",
    "train.steps=30", "optim.warmup=2", "optim.lr=3e-3", "precision=fp32",
)  # fmt: skip


def logits(trainer: Trainer, batch: Batch, keep: set[int]) -> torch.Tensor:
    """At the first columns of each row; the pixels of all tiles except those in `keep` are inverted."""
    own = torch.tensor([tile in keep for tile in range(len(batch.pixels))])
    pixels = torch.where(own[:, None, None, None], batch.pixels, 255 - batch.pixels)
    (encoded,) = trainer.vision.encode([replace(batch, pixels=pixels)])
    with generating(trainer.pipeline.parts):
        return next_logits(trainer.pipeline, encoded, torch.full((len(batch.tokens),), batch.tokens.shape[1] - 9))


def after_thirty_steps(arch: str) -> tuple[float, float]:
    """How much replacing tiles changes logits before and after training;
    in NVLM-H, only tiles seen by cross-attention."""
    config = compose_config(f"arch={arch}", "peft=lora", *SMALL)
    with joined(config) as device:
        trainer = build_trainer(config, device)
        idle.check_gates(trainer.pipeline.parts)
        steps = list(load_steps(build_steps(config), 0, 0))
        batch = steps[0].micro_batches[0]
        every = set(range(len(batch.pixels)))
        keep = set(batch.tiles_of(batch.stream_rows).tolist()) if arch == "hybrid" else set()

        def moved() -> float:
            whole = logits(trainer, batch, every)
            return float((logits(trainer, batch, keep) - whole).abs().max() / whole.abs().max())

        before = moved()
        for data in steps:
            train_step(trainer, data)
        return before, moved()


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_beside_adapters_the_model_learns_to_see(arch):
    [(before, after)] = run_distributed(after_thirty_steps, 1, arch)
    assert before == 0 or arch == "decoder"
    assert after > 1e-2


def watched(overrides: tuple[str, ...], steps: int) -> tuple[str | None, list[str]]:
    """Why the gates are refused, and the warnings of the first steps."""
    config = compose_config(*SMALL, *overrides)
    with joined(config) as device:
        trainer, refusal, warnings = build_trainer(config, device), None, []
        try:
            idle.check_gates(trainer.pipeline.parts)
        except ConfigError as error:
            refusal = str(error)
        waiting = idle.expected(config)
        for data, _ in zip(load_steps(build_steps(config), 0, 0), range(steps)):
            result = train_step(trainer, data)
            waiting, warning = idle.after_step(waiting, trainer.chunks, result.work.tiles)
            warnings += [warning] if warning else []
        return refusal, warnings


def test_gates_that_stay_shut_are_refused_and_a_group_without_a_gradient_is_named():
    [(refusal, warnings)] = run_distributed(watched, 1, ("arch=xattn", "stage=pretrain", "stage.train_xattn=false"), 12)
    assert "decoder.layers.1.cross_attention.gate" in refusal and "stage.train_xattn=true" in refusal
    [warning] = warnings
    assert warning.startswith("warning: projector: ") and "exactly zero in each of the first 10 steps" in warning


@pytest.mark.parametrize("layout", [(), ("parallel.pipeline=2", "train.micro_batch=4"), ("parallel.data=2",)])
def test_nothing_is_said_where_all_groups_have_gradients(layout):
    overrides = ("arch=xattn", "peft=lora", "parallel.distributed_optimizer=true", *layout)
    for refusal, warnings in run_distributed(watched, 2 if layout else 1, overrides, 11):
        assert refusal is None and warnings == []
