"""Chooses the attention kernels by configuration, machine and mode, and says what each saves for the backward pass.

Imports no torch. Both the model and the estimate call `choose`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nvlm.config.values import Config, cross_layers


class Mode(Enum):
    """The purpose of a forward pass."""

    TRAINING = "training"  # with gradients
    EVALUATION = "evaluation"  # whole rows, no gradients
    CACHED = "cached"  # the newest column; caches hold the columns before it


class Rows(Enum):
    """How the rows of a micro-batch are arranged."""

    KEPT = "rows"  # unchanged
    LINE = "line"  # concatenated, including padding
    TOKENS = "tokens"  # concatenated, without padding


@dataclass(frozen=True, slots=True)
class Machine:
    """What the choice depends on: whether there is a GPU, whether Transformer Engine loads, and whether its attention
    takes packed rows there (cuDNN's does from Hopper on)."""

    cuda: bool
    te: bool
    packs: bool


CPU, GPU, GPU_WITH_TE = Machine(False, False, False), Machine(True, False, False), Machine(True, True, True)
BEFORE_HOPPER = Machine(True, True, False)


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """An attention kernel, by the name of its module in nvlm.attention.kernels.

    `joint`, `apart` and `mask` say what it saves for the backward pass, in addition to queries, keys, values, output
    and each query's logsumexp.
    """

    name: str
    inner: KernelChoice | None = None  # computes on each rank, if this kernel moves data between ranks
    rows: Rows = Rows.KEPT  # the arrangement it needs
    joint: bool = True  # values are a view of the fused QKV tensor
    apart: bool = False  # its output is copied for the next linear
    mask: bool = False  # a dense mask of all pairs, as numbers


DENSE = KernelChoice("dense", mask=True)
PER_SAMPLE = KernelChoice("per_sample", rows=Rows.TOKENS, joint=False, apart=True)
FLEX = KernelChoice("flex")
TE = KernelChoice("te", rows=Rows.LINE, joint=False)


def across(kernel: KernelChoice) -> KernelChoice:
    """`kernel`, wrapped for context parallelism."""
    return KernelChoice("context", inner=kernel, joint=False, apart=True, mask=kernel.mask)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The kernels of a model in one mode, and the arrangement of rows that they need."""

    columns: KernelChoice  # for self-attention
    keys: KernelChoice | None  # for cross-attention; None if no layer has it
    rows: Rows


def choose(config: Config, machine: Machine, mode: Mode) -> Chosen:
    """The kernels of `config` on `machine` in `mode`.

    Outside training, dense masks are fast enough: rows are short, and caches hold their keys.
    """
    trains = mode is Mode.TRAINING
    pairs = FLEX if trains and machine.cuda else DENSE
    keys = pairs if cross_layers(config) else None
    if config.parallel.context > 1:
        return Chosen(across(pairs), keys, Rows.KEPT)
    whole = PER_SAMPLE if not machine.cuda else TE if uses_engine(config, machine) and machine.packs else FLEX
    return Chosen(whole if trains else DENSE, keys, _rows(whole, keys, trains))


def _rows(whole: KernelChoice, keys: KernelChoice | None, trains: bool) -> Rows:
    if whole.rows is Rows.LINE:
        return Rows.LINE  # in all modes: Transformer Engine's fused rotary embedding takes one row
    # After concatenation, a dense mask of tokens x keys would be B times as large.
    return whole.rows if trains and keys is None else Rows.KEPT


def uses_engine(config: Config, machine: Machine) -> bool:
    """Whether the decoder layers use Transformer Engine. fp32 is for comparisons, which need torch's arithmetic."""
    return machine.cuda and machine.te and config.precision.dtype == "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What kernels save for the backward pass, besides the inputs of linears. Zero: nothing."""

    norm: int = 0  # bytes per element of a norm's input; 0: the dtype of the input
    normalized: int = 0  # bytes per element, besides the norm's input, if the norm is trained
    copied: bool = False  # norms of heads save copies of their inputs, not views of the fused QKV tensor
    attention: int = 0  # bytes per element; 0: the dtype of the input
    apart: bool = False  # self-attention's output is copied for the next linear
    apart_keys: bool = False  # the same for cross-attention
    joint: bool  # values are a view of the fused QKV tensor
    rotary: bool  # cosines and sines, for queries and for keys; else the angles, once for all layers
    glu: int = 2  # widths that the gated unit saves between its linears
    dense: bool = False  # self-attention has a dense mask
    dense_keys: bool = False  # cross-attention has a dense mask
    fused_norm: bool  # norms are fused with the next linear: recomputation starts before the norm


def kernels_of(config: Config, machine: Machine = GPU_WITH_TE) -> Kernels:
    """What the kernels save when `config` is trained on `machine`."""
    chosen, te = choose(config, machine, Mode.TRAINING), uses_engine(config, machine)
    columns, keys = chosen.columns, chosen.keys
    return Kernels(
        joint=columns.joint,
        apart=columns.apart,
        apart_keys=keys is not None and keys.apart,
        dense=columns.mask,
        dense_keys=keys is not None and keys.mask,
        rotary=chosen.rows is not Rows.LINE,
        copied=te,
        fused_norm=te,
    )
