"""Low-rank adapters beside a base in FP8 (see test_engine.py)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from nvlm.arch.pipeline import build_parts
from nvlm.commands.compose import compose_config
from nvlm.estimate.load import step_load
from nvlm.estimate.memory import rank_memory
from nvlm.train.checkpoint import restore
from nvlm.train.checkpoint.save import latest
from tests.dist.checkpoints import built, saved, tensors_in
from tests.dist.run import joined, run_distributed
from tests.engine.suites.fp8 import RECIPES, SMALL, Curve, count_products, held, weights_in_bytes

LORA = (*SMALL, "peft=lora", "peft.rank=4", "optim.lr=3e-3")


def adapted_curve(overrides: tuple[str, ...], steps: int) -> tuple[Curve, Counter]:
    """And the number of FP8 products by layout: TN in the forward pass, NN for inputs' gradients, NT for weights'."""
    with joined(compose_config(*overrides)) as device:
        products = count_products()
        _, step = built(overrides, device)
        return [step() for _ in range(steps)], Counter(products)


@pytest.mark.parametrize("arch", ["decoder", "xattn"])
def test_adapters_learn_beside_a_base_in_fp8_as_beside_one_in_bf16(arch):
    steps = 12
    (plain, none), *quantized = [
        run_distributed(adapted_curve, 1, (*LORA, f"arch={arch}", f"precision={name}"), steps)[0]
        for name in ("bf16", *RECIPES)
    ]
    assert not none and plain[-1][0] < 0.8 * plain[0][0]
    for name, (losses, products) in zip(RECIPES, quantized):
        assert products["TN"] >= 4 * 3 * steps and (products["NT"] > 0) == (arch == "xattn")  # its new modules learn
        for (loss, norm), (near, near_norm) in zip(losses, plain):
            assert loss == pytest.approx(near, rel=0.01) and norm == pytest.approx(near_norm, rel=0.08), name


@pytest.mark.parametrize("name", RECIPES)
def test_recomputation_and_tensor_parallelism_change_no_adapted_step(name):
    overrides = (*LORA, "arch=hybrid", f"precision={name}", "peft.dropout=0.1")
    plain = run_distributed(adapted_curve, 1, overrides, 3)[0][0]
    for what in ("selective", "full"):
        again = run_distributed(adapted_curve, 1, (*overrides, f"train.recompute={what}"), 3)[0][0]
        assert again == [pytest.approx(step, rel=1e-5) for step in plain]
    split = run_distributed(adapted_curve, 2, (*overrides, "parallel.tensor=2", "parallel.sequence=true"), 3)[0][0]
    assert split == [(pytest.approx(loss, rel=0.01), pytest.approx(norm, rel=0.08)) for loss, norm in plain]


def save_adapted(overrides: tuple[str, ...], run: Path) -> dict[str, torch.Tensor]:
    """The base is stored as a run in bf16 begins with it, although the trainer has it only in FP8."""
    with joined(compose_config(*overrides)) as device:
        config = compose_config(*overrides)
        (begun,) = build_parts(compose_config(*overrides, "precision=bf16"))
        trainer, step = built(overrides, device)
        step()
        assert weights_in_bytes(trainer) == rank_memory(config, 1, 0, step_load(config, 1)).weights
        weights, stored = held(trainer), tensors_in(saved(trainer, overrides, run, 1))
        names = {name for name in weights if not name.endswith("scale")}
        assert names and all(torch.equal(stored[name], begun.weights()[name]) for name in names)
        return weights


def go_on_adapted(overrides: tuple[str, ...], run: Path) -> dict[str, torch.Tensor]:
    with joined(compose_config(*overrides)) as device:
        trainer, step = built((*overrides, "seed=7"), device, first=1)  # other weights, until they are loaded
        restore.load(trainer, latest(run))
        assert step()[0] > 0
        return held(trainer)


@pytest.mark.parametrize("name", RECIPES)
def test_a_base_in_fp8_is_stored_as_it_was_and_read_again(name, tmp_path):
    overrides = (*LORA, "arch=hybrid", "stage.new=[]", f"precision={name}")
    weights = run_distributed(save_adapted, 1, overrides, tmp_path)[0]
    again = run_distributed(go_on_adapted, 1, overrides, tmp_path)[0]
    assert weights.keys() == again.keys() and all(torch.equal(again[key], weights[key]) for key in weights)
