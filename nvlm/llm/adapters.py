"""Low-rank adapters (LoRA, arXiv 2106.09685) on Megatron's tensor-parallel linears.

An adapted linear computes W x + alpha / rank * up(down(x)). `up` starts at zero, so a fresh adapter changes nothing.
Names: `weight` is the base's, `adapter.down.weight` [rank, in] and `adapter.up.weight` [out, rank] are added.

Only `rank` numbers per token cross tensor-parallel ranks. Column-parallel: `down` is replicated and `up` is split like
the base. Row-parallel: `down` is split like the base, its output is summed, and `up` is replicated.
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
from nvlm.llm.backend import engine, uses_te
from nvlm.llm.dropout import COLUMNS, KEYS, dropped, places
from nvlm.llm.norm import RMSNorm
from nvlm.weights.merge import ADAPTER

_OF_KEYS = ("cross_attention.linear_kv",)  # linears that read cross-attended keys, not the text stream


@dataclass(frozen=True, slots=True)
class Linears:
    """Builders of one layer's linears: Megatron's, with adapters if `peft` is given, or Transformer Engine's (`te`)."""

    peft: PeftConfig | None
    seed: int
    layer: int  # from 0
    te: bool = False

    def column(self, name: str) -> Callable[..., nn.Module]:
        """Builder of the linear `name`, split along its output."""
        if self.te:
            return engine().TEColumnParallelLinear
        return self._adapted(AdaptedColumnLinear, name) if self.peft else ColumnParallelLinear

    def normed(self, name: str) -> Callable[..., nn.Module]:
        """Builder of the linear `name`, split along its output, which follows a norm: fused with it if `te`."""
        return engine().TELayerNormColumnParallelLinear if self.te else self.column(name)

    def row(self, name: str) -> Callable[..., nn.Module]:
        """Builder of the linear `name`, split along its input."""
        if self.te:
            return engine().TERowParallelLinear
        return self._adapted(AdaptedRowLinear, name) if self.peft else RowParallelLinear

    @property
    def norm(self) -> Callable[..., nn.Module]:
        """Builder of the norm before a `normed` linear; the identity if they are fused."""
        return IdentityOp if self.te else RMSNorm

    def _adapted(self, kind: type, name: str) -> Callable:
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
    """alpha / rank * up(down(dropout(x))). `seed` determines the dropout masks; `reads` says what x holds.

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
        return self.scale * self.up(self.down(self._drop(x))[0])[0]

    def _drop(self, x_SBF: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            return x_SBF
        rows, width = len(x_SBF), x_SBF.shape[-1]
        place_SB = places(self.reads).narrow(0, self.columns * rows, rows)
        return dropped(x_SBF, self.dropout, self.linear, place_SB, first=self.features * width)


class AdaptedColumnLinear(ColumnParallelLinear):
    """A column-parallel linear with an adapter; `seed` determines its initial weights."""

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
        split = config.sequence_parallel
        shared = {key: kwargs[key] for key in ("stride", "tp_group") if key in kwargs}
        up = ColumnParallelLinear(
            peft.rank, outputs, config=config, init_method=nn.init.zeros_, bias=False, gather_output=False, **shared
        )
        down = _Whole(inputs, peft.rank, config, partial=split)
        self.adapter = Adapter(down, up, peft, seed, reads, columns=self.tp_group.rank() if split else 0, features=0)
        nn.init.zeros_(up.weight)  # needed if Megatron is configured not to initialize weights
        _begin(self.adapter.down.weight, inputs, seed)

    def forward(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Like the base class."""
        output, bias = super().forward(x, *args, **kwargs)
        return output + self.adapter(x), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Like the base class. A gated linear's `up` is stored with gate before up, like its weight."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state |= _sharded_adapter(self, prefix, sharded_offsets, metadata)
        if self.gated:
            name = f"{prefix}{ADAPTER}.up.weight"
            state[name] = apply_swiglu_sharded_factory(
                state[name], sharded_offsets, tp_group=self.tp_group, dp_group=metadata["dp_cp_group"]
            )
        return state


class AdaptedRowLinear(RowParallelLinear):
    """A row-parallel linear with an adapter; `seed` determines its initial weights."""

    def __init__(
        self, inputs: int, outputs: int, *, config: TransformerConfig, peft: PeftConfig, seed: str, **kwargs
    ) -> None:
        super().__init__(inputs, outputs, config=config, **kwargs)
        down = RowParallelLinear(
            inputs,
            peft.rank,
            config=config,
            init_method=nn.init.zeros_,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )
        up = _Whole(peft.rank, outputs, config, partial=config.sequence_parallel)
        self.adapter = Adapter(down, up, peft, seed, COLUMNS, columns=0, features=self.tp_group.rank())
        _begin(down.weight, inputs, seed, self.tp_group)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Like the base class."""
        output, bias = super().forward(x)
        return output + self.adapter(x), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Like the base class."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return state | _sharded_adapter(self, prefix, sharded_offsets, metadata)


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
