"""The encoder's quantized linears: which are replaced, the error this causes, and the refusal of too large an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nvlm.config.values import ConfigError
from nvlm.vision.path import VisionPath
from nvlm.vision.quantize import MOST, quantize
from tests.models import TILE, build_twins, small_config

FLOATS = {"e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}


class Rounded(nn.Module):
    """A linear whose weights and inputs are rounded to a format with one scale per tensor."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.kind, self.bias = FLOATS[kind], linear.bias
        self.weight = self.rounded(linear.weight.detach())

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max() / torch.finfo(self.kind).max
        return (x / scale).to(self.kind).float() * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.rounded(x), self.weight, self.bias)


@pytest.fixture
def path(megatron) -> VisionPath:
    return build_twins(small_config("arch=decoder")).vision


def test_fp8_linears_cost_a_few_percent_of_the_features(path):
    linears = [m for m in path.encoder.modules() if isinstance(m, nn.Linear)]
    assert 0.002 < quantize(path, lambda linear: Rounded(linear, "e4m3"), TILE) < MOST
    replaced = [m for m in path.encoder.modules() if isinstance(m, Rounded)]
    assert len(replaced) == len(linears) == 4 * len(path.encoder.layers)


def test_a_finer_format_costs_less(path, megatron):
    coarse = quantize(path, lambda linear: Rounded(linear, "e4m3"), TILE)
    other = build_twins(small_config("arch=decoder")).vision
    assert quantize(other, lambda linear: Rounded(linear, "bf16"), TILE) < coarse / 4


@pytest.mark.parametrize("factor", [0.0, 3.0, float("nan")])
def test_an_encoder_that_changes_too_much_is_refused(factor, path):
    def broken(linear: nn.Module) -> Rounded:
        made = Rounded(linear, "bf16")
        made.weight *= factor
        return made

    with pytest.raises(ConfigError, match="precision.encoder: got features .* off"):
        quantize(path, broken, TILE)
