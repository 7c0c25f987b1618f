"""Low-rank adapters (LoRA, arXiv 2106.09685) on tensor-parallel linears, Megatron's or Transformer Engine's.

An adapted linear computes W x + alpha / rank * up(down(x)). `up` starts at zero, so a fresh adapter changes nothing.
Names: `weight` is the base's, `adapter.down.weight` [rank, in] and `adapter.up.weight` [out, rank] are added.

Only `rank` numbers per token cross tensor-parallel ranks. Column-parallel: `down` is replicated and `up` is split like
the base. Row-parallel: `down` is split like the base, its output is summed, and `up` is replicated.

`down` and `up` are plain linears in the model's dtype, even if the base multiplies in FP8.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from nvlm.config.values import Config, PeftConfig
from nvlm.llm.backend import engine, of_megatron, uses_te
from nvlm.llm.dropout import COLUMNS, KEYS, dropped, places
from nvlm.llm.norm import RMSNorm
from nvlm.weights.merge import ADAPTER

_OF_KEYS = ("cross_attention.linear_kv",)  # linears that read cross-attended keys, not the text stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinds:
    """The classes of a layer's linears."""

    column: type  # split along its output
    normed: type  # the same, after a norm
    row: type  # split along its input


@dataclass(frozen=True, slots=True)
class Linears:
    """Builders of one layer's linears: Megatron's or Transformer Engine's (`te`), with adapters if `peft` is given."""

    peft: PeftConfig | None
    seed: int
    layer: int  # from 0
    te: bool = False

    def column(self, name: str) -> Callable[..., nn.Module]:
        """Builder of the linear `name`, split along its output."""
        return self._builder(self._kinds.column, name)

    def normed(self, name: str) -> Callable[..., nn.Module]:
        """Builder of the linear `name`, split along its output, which follows a norm: fused with it if `te`."""
        return self._builder(self._kinds.normed, name)

    def row(self, name: str) -> Callable[..., nn.Module]:
        """Builder of the linear `name`, split along its input."""
        return self._builder(self._kinds.row, name)

    @property
    def norm(self) -> Callable[..., nn.Module]:
        """Builder of the norm before a `normed` linear; the identity if they are fused."""
        return IdentityOp if self.te else RMSNorm

    @property
    def _kinds(self) -> Kinds:
        if not self.te:
            return _ADAPTED if self.peft else _PLAIN
        if self.peft:
            from nvlm.llm.te_adapters import ADAPTED

            return ADAPTED
        te = engine()
        return Kinds(
            column=te.TEColumnParallelLinear, normed=te.TELayerNormColumnParallelLinear, row=te.TERowParallelLinear
        )

    def _builder(self, kind: type, name: str) -> Callable[..., nn.Module]:
        if not self.peft:
            return kind
        seed = f"{self.seed} adapter {self.layer} {name}"
        return functools.partial(kind, peft=self.peft, seed=seed, **({"reads": KEYS} if name in _OF_KEYS else {}))


def linears_of(config: Config, group: str, layer: int) -> Linears:
    """Builders of the linears of layer `layer` (from 0) in the module group `group`."""
    return Linears(config.peft if group in config.adapted else None, config.seed, layer, uses_te(config))


class _Whole(nn.Linear):
    """A linear replicated on each rank. `partial`: each rank's gradient covers only a part of the sequence."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, partial: bool) -> None:
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=config.params_dtype))
        self.weight.sequence_parallel = partial  # Megatron sums the gradients of such weights

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class Adapter(nn.Module):
    """up(alpha / rank * down(dropout(x))). `seed` determines the dropout masks; `reads` says what x holds.

    `columns` and `features`: this tensor-parallel rank if the ranks split x along that dimension, else 0.
    """

    def __init__(
        self, down: nn.Module, up: nn.Module, peft: PeftConfig, seed: str, reads: str, columns: int, features: int
    ) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.scale, self.dropout, self.reads = peft.scale, peft.dropout, reads
        self.linear, self.columns, self.features = zlib.crc32(f"{seed} dropout".encode()), columns, features

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.scale * self.down(self._drop(x))[0])[0]

    def _drop(self, x_SBF: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            return x_SBF
        rows, width = len(x_SBF), x_SBF.shape[-1]
        place_SB = places(self.reads).narrow(0, self.columns * rows, rows)
        return dropped(x_SBF, self.dropout, self.linear, place_SB, first=self.features * width)


class Adapted:
    """A linear's part that concerns its `adapter`; the base class of the linear itself comes after this one."""

    adapter: Adapter

    def forward(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Like the base class."""
        output, bias = super().forward(x, *args, **kwargs)
        return output + self.adapter(x), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Like the base class."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return state | _sharded_adapter(self, prefix, sharded_offsets, metadata)


class AdaptedColumn(Adapted):
    """Adds an adapter to a column-parallel linear; `seed` determines its initial weights."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        config: TransformerConfig,
        peft: PeftConfig,
        seed: str,
        reads: str = COLUMNS,
        **kwargs,
    ) -> None:
        super().__init__(inputs, outputs, config=config, **kwargs)
        self.gated = kwargs.get("stride", 1) == 2  # each rank holds its share of gate, then its share of up
        split, config = config.sequence_parallel, of_megatron(config)
        shared = {key: kwargs[key] for key in ("stride", "tp_group") if key in kwargs}
        up = ColumnParallelLinear(
            peft.rank, outputs, config=config, init_method=nn.init.zeros_, bias=False, gather_output=False, **shared
        )
        down = _Whole(inputs, peft.rank, config, partial=split)
        self.adapter = Adapter(down, up, peft, seed, reads, columns=self.tp_group.rank() if split else 0, features=0)
        nn.init.zeros_(up.weight)  # needed if Megatron is configured not to initialize weights
        _begin(self.adapter.down.weight, inputs, seed)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Like the base class. A gated linear's `up` is stored with gate before up, like its weight."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.gated:
            name = f"{prefix}{ADAPTER}.up.weight"
            state[name] = apply_swiglu_sharded_factory(
                state[name], sharded_offsets, tp_group=self.tp_group, dp_group=metadata["dp_cp_group"]
            )
        return state


class AdaptedRow(Adapted):
    """Adds an adapter to a row-parallel linear; `seed` determines its initial weights."""

    def __init__(
        self, inputs: int, outputs: int, *, config: TransformerConfig, peft: PeftConfig, seed: str, **kwargs
    ) -> None:
        super().__init__(inputs, outputs, config=config, **kwargs)
        down = RowParallelLinear(
            inputs,
            peft.rank,
            config=of_megatron(config),
            init_method=nn.init.zeros_,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )
        up = _Whole(peft.rank, outputs, config, partial=config.sequence_parallel)
        self.adapter = Adapter(down, up, peft, seed, COLUMNS, columns=0, features=self.tp_group.rank())
        _begin(down.weight, inputs, seed, self.tp_group)


class AdaptedColumnLinear(AdaptedColumn, ColumnParallelLinear):
    """Megatron's column-parallel linear with an adapter."""


class AdaptedRowLinear(AdaptedRow, RowParallelLinear):
    """Megatron's row-parallel linear with an adapter."""


_PLAIN = Kinds(column=ColumnParallelLinear, normed=ColumnParallelLinear, row=RowParallelLinear)
_ADAPTED = Kinds(column=AdaptedColumnLinear, normed=AdaptedColumnLinear, row=AdaptedRowLinear)


def _sharded_adapter(linear: nn.Module, prefix: str, sharded_offsets: tuple, metadata: dict | None) -> dict:
    # The base class takes its children for replicated, but each linear of the adapter knows how it is split.
    state = {}
    for name, child in linear.adapter.named_children():
        below = f"{prefix}{ADAPTER}.{name}."
        state |= sharded_state_dict_default(child, below, sharded_offsets, metadata, tp_group=linear.tp_group)
    return state


@torch.no_grad()
def _begin(down: nn.Parameter, inputs: int, seed: str, group=None) -> None:
    """Fill `down`, this rank's shard in `group`, uniformly in +-1 / sqrt(inputs). The whole weight is the same in every
    layout, and the generators of the base's weights are not advanced."""
    if down.is_meta:
        return
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(seed.encode()))
    whole = torch.empty(len(down), inputs, device="cpu").uniform_(-1, 1, generator=generator) * inputs**-0.5
    down.copy_(whole if group is None else whole.chunk(group.size(), dim=1)[group.rank()])
