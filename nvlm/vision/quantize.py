"""The frozen encoder's linears in FP8, by Transformer Engine: half the memory and, on Hopper, twice the FLOP/s.

The encoder is never trained, so only FP8 weights are kept. The error is measured at once, on noise, and an encoder
whose features change too much is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nvlm.config.compute import PrecisionConfig
from nvlm.config.values import problem
from nvlm.llm.backend import frozen_recipe

if TYPE_CHECKING:
    from nvlm.vision.path import VisionPath

MOST = 0.1  # relative error of the features: FP8 with three mantissa bits rounds by up to 1 / 16


class FP8Linear(nn.Module):
    """A linear with FP8 weights; its product adds the bias. The rows of its input fit `precision.multiple`."""

    def __init__(self, linear: nn.Linear, precision: PrecisionConfig) -> None:
        super().__init__()
        import transformer_engine.pytorch as te

        self.recipe, has_bias = frozen_recipe(precision.name), linear.bias is not None
        with torch.no_grad(), te.fp8_model_init(enabled=True, recipe=self.recipe):
            self.linear = te.Linear(
                linear.in_features, linear.out_features, bias=has_bias, params_dtype=linear.weight.dtype
            )
            self.linear.weight.copy_(linear.weight)
            if has_bias:
                self.linear.bias.copy_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        import transformer_engine.pytorch as te

        with te.fp8_autocast(enabled=True, fp8_recipe=self.recipe):
            return self.linear(x)


def quantize(path: VisionPath, make: Callable[[nn.Linear], nn.Module], tile_size: int, tiles: int = 4) -> float:
    """Replace each linear of the encoder by `make(linear)`.

    Returns the relative error (root mean square) of the features of `tiles` tiles of noise. Raises ConfigError if it
    exceeds `MOST`.
    """
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (tiles, 3, tile_size, tile_size), generator=noise, dtype=torch.uint8)
    pixels = pixels.to(next(path.encoder.parameters()).device)
    exact = path.features(pixels).float()
    for module in list(path.encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, make(child).eval())
    error = float((path.features(pixels).float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    if not error <= MOST:
        expected = f"features within {MOST:.0%} of the exact ones"
        raise problem("precision.encoder", f"features {error:.0%} off", expected, "precision.encoder=false")
    return error
