"""Training in FP8 by Transformer Engine's own Python, on kernels that torch computes (see test_engine.py)."""

from __future__ import annotations

import pytest

from nvlm.cli import compose_config
from tests.dist.run import joined, run_distributed
from tests.dist.test_checkpoint import built
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
    """A list that grows by a layout with each product of quantized tensors."""
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
        assert losses != plain and abs(mean / expected - 1) < 0.005, (name, mean, expected)  # 0.002 at worst
        for (loss, norm), (near, near_norm) in zip(losses, plain):
            assert loss == pytest.approx(near, rel=0.01) and norm == pytest.approx(near_norm, rel=0.05), name
