"""The kernels that a model uses in one mode, for its forward pass and its layer specs.

Shapes: S columns that this context-parallel rank computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nvlm.attention import choice, kernels
from nvlm.attention.cache import Past
from nvlm.attention.choice import Machine, Mode, Rows
from nvlm.attention.kernel import Kernel, Masks, View
from nvlm.attention.rows import Arranged, arranged, arranged_shape
from nvlm.config.values import Config
from nvlm.data.batch import Batch


@dataclass(frozen=True, slots=True)
class ModelAttention:
    """The kernels that `choice.choose` picked."""

    columns: Kernel
    keys: Kernel | None
    rows: Rows
    multiple: int  # tokens; row lengths must be a multiple of this

    @property
    def core(self) -> type[nn.Module]:
        """The core attention in layer specs."""
        return self.columns.core

    def arranged(self, batch: Batch) -> Arranged:
        """`batch` with its rows arranged for the kernels."""
        return arranged(batch, self.rows, self.multiple)

    def arranged_shape(self, batch: Batch) -> tuple[int, int] | None:
        """Columns and rows of `batch` once it is arranged; None if its padding decides."""
        return arranged_shape(batch, self.rows)

    def masks(self, batch: Batch, columns_S: Tensor, keys: bool) -> Masks:
        """The views of an arranged batch. `keys`: whether there are cross-attention layers."""
        return Masks(columns=self.columns.columns(batch), keys=self.keys.keys(batch, columns_S) if keys else None)

    def cached(self, past: Past) -> Masks:
        """The views of the newest column over the caches."""
        return Masks(
            columns=View(self.columns, past.columns), keys=None if self.keys is None else View(self.keys, past.keys)
        )


def build_attention(config: Config, machine: Machine, mode: Mode) -> ModelAttention:
    """The kernels of a model of `config` in `mode`. Imports only the chosen kernels."""
    chosen = choice.choose(config, machine, mode)
    keys = None if chosen.keys is None else kernels.build(chosen.keys, config)
    return ModelAttention(kernels.build(chosen.columns, config), keys, chosen.rows, config.row_multiple)
