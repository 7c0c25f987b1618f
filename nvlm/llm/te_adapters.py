"""Transformer Engine's linears with adapters. Imported only if it is in use (nvlm.llm.backend)."""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from torch import Tensor

from nvlm.llm.adapters import AdaptedColumn, AdaptedRow, Kinds


class AdaptedTEColumnLinear(AdaptedColumn, TEColumnParallelLinear):
    """Transformer Engine's column-parallel linear with an adapter."""


class AdaptedTERowLinear(AdaptedRow, TERowParallelLinear):
    """Transformer Engine's row-parallel linear with an adapter."""


class AdaptedTENormedLinear(AdaptedColumn, TELayerNormColumnParallelLinear):
    """A norm fused with a column-parallel linear with an adapter, which reads the norm's output.

    Under sequence parallelism the adapter reads this rank's part of it, so that the gathered input needs no bf16 form.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        assert not self.te_return_bias
        self.return_layernorm_output = True

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Like the base class."""
        (output, normed), bias = TELayerNormColumnParallelLinear.forward(self, x)
        return output + self.adapter(normed), bias


ADAPTED = Kinds(column=AdaptedTEColumnLinear, normed=AdaptedTENormedLinear, row=AdaptedTERowLinear)
