"""The frozen encoder's linears in FP8, by Transformer Engine: half the memory and, on Hopper, twice the FLOP/s.

The encoder is never trained, so only FP8 weights are kept. The error is measured at once, on noise, and an encoder
whose features change too much is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from nvlm.config.compute import PrecisionConfig
from nvlm.config.values import problem
from nvlm.llm.backend import frozen_recipe

if TYPE_CHECKING:
    from nvlm.vision.path import VisionPath

MOST = 0.1  # relative error of the features: FP8 with three mantissa bits rounds by up to 1 / 16


class FP8Linear(nn.Module):
    """A Megatron linear of one tensor-parallel rank, with FP8 weights."""

    def __init__(self, linear: nn.Module, precision: PrecisionConfig) -> None:
        super().__init__()
        import transformer_engine.pytorch as te

        outputs, inputs = linear.weight.shape
        self.precision, self.apart = precision, linear.skip_bias_add
        self.bias = linear.bias
        with torch.no_grad(), te.fp8_model_init(enabled=True, recipe=frozen_recipe(precision.name)):
            self.linear = te.Linear(inputs, outputs, bias=False, params_dtype=linear.weight.dtype)
            self.linear.weight.copy_(linear.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(output, None), or (output, bias) if the linear leaves the bias to its caller."""
        import transformer_engine.pytorch as te

        rows = x.flatten(0, -2)
        short = -len(rows) % self.precision.multiple
        with te.fp8_autocast(enabled=True, fp8_recipe=frozen_recipe(self.precision.name)):
            out = self.linear(nn.functional.pad(rows, (0, 0, 0, short)))
        out = out[: len(rows)].unflatten(0, x.shape[:-1])
        if self.apart or self.bias is None:
            return out, self.bias
        return out + self.bias, None


def quantize(path: VisionPath, make: Callable[[nn.Module], nn.Module], tile_size: int, tiles: int = 4) -> float:
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
            if isinstance(child, ColumnParallelLinear | RowParallelLinear):
                setattr(module, name, make(child).eval())
    error = float((path.features(pixels).float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    if not error <= MOST:
        expected = f"features within {MOST:.0%} of the exact ones"
        raise problem("precision.encoder", f"features {error:.0%} off", expected, "precision.encoder=false")
    return error
