"""The kernels that a model uses in one mode, as its forward pass and its layer specs ask for them.

Shapes: S columns that this context-parallel rank computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nvlm.attention import choice, kernels
from nvlm.attention.cache import Past
from nvlm.attention.choice import Machine, Mode, Rows
from nvlm.attention.kernel import Kernel, Masks, View
from nvlm.attention.rows import Arranged, arranged
from nvlm.config.values import Config
from nvlm.data.batch import Batch


@dataclass(frozen=True, slots=True)
class ModelAttention:
    """What `choice.choose` chose, built."""

    columns: Kernel
    keys: Kernel | None
    rows: Rows
    multiple: int  # what the length of a row must be a multiple of, tokens

    @property
    def core(self) -> type[nn.Module]:
        """The core attention that layer specs name."""
        return self.columns.core

    def arranged(self, batch: Batch) -> Arranged:
        """`batch` with its rows as the kernels want them."""
        return arranged(batch, self.rows, self.multiple)

    def masks(self, batch: Batch, columns_S: Tensor, keys: bool) -> Masks:
        """What the tokens of an arranged batch see. `keys`: whether there are layers with cross-attention."""
        return Masks(columns=self.columns.columns(batch), keys=self.keys.keys(batch, columns_S) if keys else None)

    def cached(self, past: Past) -> Masks:
        """What the newest column sees of what caches keep."""
        return Masks(
            columns=View(self.columns, past.columns), keys=None if self.keys is None else View(self.keys, past.keys)
        )


def build_attention(config: Config, machine: Machine, mode: Mode) -> ModelAttention:
    """The kernels of a model of `config` in `mode`. Imports those that are chosen, and no others."""
    chosen = choice.choose(config, machine, mode)
    keys = None if chosen.keys is None else kernels.build(chosen.keys, config)
    return ModelAttention(kernels.build(chosen.columns, config), keys, chosen.rows, config.row_multiple)
