"""Training in FP8 with Transformer Engine's Python code, on kernels that torch computes (see test_engine.py)."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import nn

from benchmarks.kernel_counts import Counting
from nvlm.arch.pipeline import build_parts, next_logits
from nvlm.attention.cache import generating
from nvlm.commands.compose import compose_config
from nvlm.config.compute import PrecisionConfig
from nvlm.data.loader import load_steps
from nvlm.estimate.load import step_load
from nvlm.estimate.memory import rank_memory
from nvlm.evaluate.during import evaluation_of
from nvlm.export.trained import TrainedWeights
from nvlm.train import loop
from nvlm.train.checkpoint import restore
from nvlm.train.checkpoint.save import latest
from nvlm.train.loop import build_steps
from nvlm.train.step import settle
from nvlm.vision.path import build_vision
from nvlm.vision.quantize import FP8Linear, quantize
from tests.dist import run as run_module
from tests.dist.checkpoints import built, saved, tensors_in
from tests.dist.run import joined, run_distributed
from tests.engine import kernels

SMALL = (
    "data.records=16", "data.workers=0", "train.global_batch=4", "llm.layers=3", "llm.cross_every=2",
    "optim.warmup=1", "train.steps=20", "optim.lr=1e-3",
)  # fmt: skip
RECIPES = ("fp8_delayed", "fp8_current")
Curve = list[tuple[float, float]]
"""Loss and gradient norm of each step."""


def curve(overrides: tuple[str, ...], steps: int) -> tuple[Curve, int]:
    """And the number of FP8 products."""
    with joined(compose_config(*overrides)) as device:
        products = count_products()
        _, step = built(overrides, device)
        return [step() for _ in range(steps)], len(products)


def count_products() -> list[str]:
    """A list that gets a layout for each product of quantized tensors."""
    products, multiply = [], kernels.generic_gemm

    def counted(A, transa, B, transb, *args, **kwargs):
        if hasattr(A, "_quantizer"):
            assert hasattr(B, "_quantizer")
            products.append("NT"[transa] + "NT"[transb])
        return multiply(A, transa, B, transb, *args, **kwargs)

    kernels.generic_gemm = counted
    return products


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_losses_stay_near_those_in_bf16(arch):
    steps = 20
    (plain, none), *quantized = [
        run_distributed(curve, 1, (*SMALL, f"arch={arch}", f"precision={name}"), steps)[0]
        for name in ("bf16", *RECIPES)
    ]
    assert none == 0 and plain[-1][0] < 0.5 * plain[0][0]
    for name, (losses, products) in zip(RECIPES, quantized):
        assert products % steps == 0 and products > 0
        mean, expected = (sum(loss for loss, _ in run) / steps for run in (losses, plain))
        assert losses != plain and abs(mean / expected - 1) < 0.005, (name, mean, expected)  # 0.0012 at worst
        for (loss, norm), (near, near_norm) in zip(losses, plain):
            assert loss == pytest.approx(near, rel=0.01) and norm == pytest.approx(near_norm, rel=0.05), name


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("arch", ["decoder", "hybrid"])
def test_recomputing_changes_no_step(arch, name):
    overrides = (*SMALL, f"arch={arch}", f"precision={name}")
    plain, *again = [
        run_distributed(curve, 1, (*overrides, f"train.recompute={what}"), 3)[0]
        for what in ("none", "selective", "full")
    ]
    for (steps, products), more in zip(again, (1, 2)):
        assert steps == [pytest.approx(step, rel=1e-5) for step in plain[0]]
        assert products > plain[1] * (1 + 0.05 * more)


GATHER = (*SMALL, "arch=hybrid", "parallel.distributed_optimizer=true", "parallel.gradients=bf16")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_weights_kept_in_fp8_give_the_same_steps(name, world):
    """Without clipping: the two ways sum the gradient norm in different orders, and FP8 rounding amplifies the last
    digit of a clipping factor to 1e-3 of a loss within a few steps."""
    overrides = (*GATHER, f"precision={name}", f"parallel.data={world}", "optim.clip=0")
    plain, kept = [
        run_distributed(curve, world, (*overrides, f"precision.param_gather={gather}"), 6)[0]
        for gather in ("false", "true")
    ]
    assert kept[1] == plain[1] > 0
    assert kept[0] == [pytest.approx(step, rel=1e-6) for step in plain[0]]


def held(trainer) -> dict[str, torch.Tensor]:
    """The exact operands: bytes and scales of weights in FP8."""
    found = {}
    for name, weight in trainer.pipeline.parts[0].named_parameters():
        if is_float8tensor(weight):
            found |= {name: weight._data.clone(), f"{name} scale": weight._scale_inv.clone()}
    return found


def weights_in_bytes(trainer) -> int:
    """Bytes of the weights of the decoder and of the rest, as stored."""
    tensors = []
    for weight in trainer.pipeline.parts[0].parameters():
        tensors += [weight._data, weight._transpose] if is_float8tensor(weight) else [weight]
    return sum(x.numel() * x.element_size() for x in tensors)


def save(overrides: tuple[str, ...], run: Path) -> tuple[dict[str, torch.Tensor], Curve]:
    with joined(compose_config(*overrides)) as device:
        trainer, step = built(overrides, device)
        for _ in range(3):
            step()
        config = compose_config(*overrides)
        if config.precision.param_gather:
            planned = rank_memory(config, 2, 0, step_load(config, 2))
            assert weights_in_bytes(trainer) == planned.weights
        folder = saved(trainer, overrides, run, 3, mean=0.1)
        weights = held(trainer)
        names = {name for name in weights if not name.endswith("scale")}
        stored = tensors_in(folder)
        assert not stored.keys() & names and {f"optimizer.state.param.{name}" for name in names} <= stored.keys()
        return weights, [step(), step()]


def go_on(overrides: tuple[str, ...], run: Path) -> tuple[dict[str, torch.Tensor], Curve]:
    with joined(compose_config(*overrides)) as device:
        trainer, step = built(overrides, device, first=3)
        loaded = restore.load(trainer, latest(run))
        assert (loaded.step, loaded.numbers) == (3, {"mean": 0.1})
        return held(trainer), [step(), step()]


def read_otherwise(overrides: tuple[str, ...], run: Path) -> int:
    """The next stage and an export find the optimizer's weights in bf16; returns the number of such weights."""
    with joined(compose_config(*overrides)):
        (part,) = build_parts(compose_config(*overrides))
        assert restore.load_weights([part], latest(run)) == []
        stored, exported, found = tensors_in(latest(run)), TrainedWeights([latest(run)]), 0
        for name, weight in part.weights().items():
            if name not in stored:
                found += 1
                expected = stored[f"optimizer.state.param.{name}"].bfloat16()
                assert torch.equal(weight, expected) and torch.equal(exported.read(name), expected)
                assert exported.dtype(name) == torch.bfloat16
        return found


@pytest.mark.parametrize("gather", ["false", "true"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_goes_on_with_the_same_bits(name, gather, tmp_path):
    overrides = (*GATHER, f"precision={name}", f"precision.param_gather={gather}")
    other = (*GATHER, f"precision={name}", f"precision.param_gather={'true' if gather == 'false' else 'false'}")
    two = (*overrides, "parallel.data=2")
    weights, steps = run_distributed(save, 2, two, tmp_path)[0]
    assert len(weights) == (2 * (3 * 4 + 3) if gather == "true" else 0)
    again, same = run_distributed(go_on, 2, two, tmp_path)[0]
    assert weights.keys() == again.keys() and all(torch.equal(again[key], weights[key]) for key in weights)
    assert same == steps
    near = [tuple(pytest.approx(number, rel=0.01) for number in step) for step in steps]
    assert run_distributed(go_on, 1, overrides, tmp_path)[0][1] == near
    assert run_distributed(go_on, 1, other, tmp_path)[0][1] == near
    assert run_distributed(read_otherwise, 1, (*SMALL, "arch=hybrid"), tmp_path)[0] == len(weights) // 2


def logits(overrides: tuple[str, ...]) -> torch.Tensor:
    """After the prompts of a step's first rows, after two steps of training: as in evaluation and generation."""
    config = compose_config(*overrides)
    with joined(config) as device:
        trainer, step = built(overrides, device)
        step(), step()
        settle(trainer)
        batch = next(iter(load_steps(build_steps(config), 0, 0))).micro_batches[0].to(device)
        (batch,) = trainer.vision.encode([batch])
        with generating(trainer.pipeline.parts):
            found = next_logits(trainer.pipeline, batch, torch.full((len(batch.tokens),), 5))
        step()  # and training goes on
        return found.float().clone()


def test_what_is_kept_in_fp8_answers_in_bf16():
    plain, kept = [
        run_distributed(logits, 1, (*GATHER, "precision=fp8_current", f"precision.param_gather={gather}"))[0]
        for gather in ("false", "true")
    ]
    assert kept.isfinite().all() and not torch.equal(kept, plain)
    assert float((kept - plain).norm() / plain.norm()) < 0.05


def whole_run(overrides: tuple[str, ...], run: Path) -> list[dict]:
    """Its metrics by step, from a separate process like launch/train.py."""
    check = loop.check_precision
    loop.check_precision = lambda config: None  # which asks for a GPU
    os.environ["MASTER_PORT"] = str(next(run_module._ports))
    run.mkdir(exist_ok=True)
    try:
        config = compose_config(*overrides)
        loop.run(config, run, None, evaluation_of(config, run, time.time()))
    finally:
        loop.check_precision = check
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


WHOLE = pytest.mark.parametrize(
    "settings",
    [
        ("precision=fp8_delayed", "precision.encoder=true"),
        (
            "precision=fp8_current", "precision.edges=1", "llm.layers=4",
            "precision.param_gather=true", "parallel.distributed_optimizer=true",
        ),
    ],
    ids=["delayed", "current"],
)  # fmt: skip


@WHOLE
def test_a_run_learns_saves_answers_and_goes_on(settings, tmp_path):
    overrides = (*SMALL, "arch=hybrid", "evaluate.questions=6", "train.save_every=4", "train.threads=1", *settings)
    run = tmp_path / "run"
    first = run_distributed(whole_run, 1, (*overrides, "train.steps=6"), run)[0]
    both = run_distributed(whole_run, 1, (*overrides, "train.steps=8", "resume=auto"), run)[0]
    assert [line["step"] for line in both] == list(range(1, 9)) and both[:6] == first
    assert (
        both[-1]["loss"] < 0.8 * both[0]["loss"]
        and (run / "evaluation" / "heldout" / "step_00000008" / "score.json").is_file()
    )


@WHOLE
def test_evaluation_disturbs_neither_scales_nor_weights(settings, tmp_path):
    overrides = (*SMALL, "arch=hybrid", "train.save_every=4", "train.threads=1", "train.steps=6", *settings)
    measured = ("evaluate.every=1", "evaluate.losses=4", "evaluate.questions=4", "evaluate.batch=2")
    alone = run_distributed(whole_run, 1, (*overrides, "evaluate=none"), tmp_path / "alone")[0]
    inside = run_distributed(whole_run, 1, (*overrides, *measured), tmp_path / "inside")[0]
    assert [line["loss"] for line in inside] == [line["loss"] for line in alone]
    assert [line["grad_norm"] for line in inside] == [line["grad_norm"] for line in alone]


class Padded(nn.Module):
    """An FP8 linear that pads its own input with zeros."""

    def __init__(self, linear: nn.Linear, precision: PrecisionConfig) -> None:
        super().__init__()
        self.linear, self.multiple = FP8Linear(linear, precision), precision.multiple

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        padded = nn.functional.pad(rows, (0, 0, 0, -len(rows) % self.multiple))
        return self.linear(padded)[: len(rows)].unflatten(0, x.shape[:-1])


def encoder_features(tiles: int) -> list[tuple[torch.Tensor, Counter]]:
    """Features and the operations behind them: in bf16, in FP8 with each linear padding its input, and as they are."""
    config = compose_config(*SMALL, "arch=decoder", "precision=fp8_current", "precision.encoder=true")
    exact = dataclasses.replace(config, precision=dataclasses.replace(config.precision, encoder=False))
    side, found = config.vision.tile_size, []
    with joined(config) as device:
        plain, apart, path = build_vision(exact, device), build_vision(exact, device), build_vision(config, device)
        quantize(apart, lambda linear: Padded(linear, config.precision), side)
        pixels = torch.randint(0, 256, (tiles, 3, side, side), dtype=torch.uint8)
        for each in (plain, apart, path):
            with Counting() as mode:
                found.append((each.features(pixels), mode.count.names))
    return found


@pytest.mark.parametrize("tiles", [1, 3])
def test_the_encoder_pads_once_a_pass(tiles):
    found = run_distributed(encoder_features, 1, tiles)[0]
    (plain, before), (apart, padding), (features, operations) = [(x.float(), names) for x, names in found]
    assert padding["constant_pad_nd"] == 4 * 4  # linears
    assert not operations["constant_pad_nd"] and operations["cat"] == before["cat"]
    scale = plain.square().mean().sqrt()
    of_fp8, of_padding = (float((features - other).square().mean().sqrt() / scale) for other in (plain, apart))
    assert of_padding < 0.05 * of_fp8 and 0.002 < of_fp8 < 0.1, (of_padding, of_fp8)
