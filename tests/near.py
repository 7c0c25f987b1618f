"""Compares with the reference, which computes in fp64, by differences relative to a tensor's largest value.

Where the reference is zero, ours must be exactly zero. The worst seen are 2e-7 for losses and 3e-6 for gradients.
Gradients of gates and of the key biases are sums of terms that nearly cancel, so rounding matters more in them (worst
seen 1e-5).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOSS, GRADIENT, CANCELLING = 2e-6, 1e-5, 1e-4


def gap(actual: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest expected value; huge where a zero is expected and missed."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    difference = (actual.to(expected) - expected).abs().max().item()
    assert difference == difference, "NaN"
    return difference / (expected.abs().max().item() or 1e-300)


def assert_near(actual: Tensor, expected: Tensor, what: object, tolerance: float = LOSS) -> None:
    off = gap(actual, expected)
    assert off <= tolerance, f"{what}: {off:.1e} of the largest value, at most {tolerance} allowed"


def assert_gradients_near(
    actual: dict[str, Tensor], expected: dict[str, Tensor], cancelling: float = CANCELLING
) -> None:
    assert actual.keys() == expected.keys()
    gates = [name for name in expected if name.endswith(".gate")]
    gaps = {name: gap(actual[name], expected[name]) for name in expected if name not in gates}
    if gates:  # single numbers: one of them may be next to zero, all together are not
        gaps["gates"] = gap(torch.cat([actual[n] for n in gates]), torch.cat([expected[n] for n in gates]))
    wide = ("gates", ".k_proj.bias")
    wrong = {n: f"{off:.1e}" for n, off in gaps.items() if not off <= (cancelling if n.endswith(wide) else GRADIENT)}
    assert not wrong, f"{len(wrong)} of {len(gaps)} gradients differ: {wrong}"
