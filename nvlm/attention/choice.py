"""The one choice of attention kernels, by configuration, machine and mode, and what each of them keeps for the backward
pass. No torch: the model asks `choose`, and so does the estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nvlm.config.values import Config, cross_layers


class Mode(Enum):
    """What a forward pass is for."""

    TRAINING = "training"  # gradients may be asked for
    EVALUATION = "evaluation"  # whole rows, no gradients
    CACHED = "cached"  # the newest column of rows; caches hold the others


class Rows(Enum):
    """How the rows of a micro-batch are arranged."""

    KEPT = "rows"  # as they are
    LINE = "line"  # one behind the other, padding included
    TOKENS = "tokens"  # one behind the other, without padding


@dataclass(frozen=True, slots=True)
class Machine:
    """What the choice depends on: whether there is a GPU, and whether Transformer Engine loads."""

    cuda: bool
    te: bool


CPU, GPU, GPU_WITH_TE = Machine(False, False), Machine(True, False), Machine(True, True)


@dataclass(frozen=True, slots=True)
class Kernel:
    """An attention kernel, by the name of its module in nvlm.attention.kernels.

    `joint`, `apart` and `mask` say what it keeps for the backward pass beside queries, keys, values, output and each
    query's logsumexp.
    """

    name: str
    inner: Kernel | None = None  # the kernel that computes on each rank, where this one moves data between ranks
    rows: Rows = Rows.KEPT  # how it wants a micro-batch
    joint: bool = True  # values stay a view of queries, keys and values in one
    apart: bool = False  # its output is copied for the linear behind it
    mask: bool = False  # the mask of all pairs, as numbers


DENSE = Kernel("dense", mask=True)
PER_SAMPLE = Kernel("per_sample", rows=Rows.TOKENS, joint=False, apart=True)
FLEX = Kernel("flex")
TE = Kernel("te", rows=Rows.LINE, joint=False)


def across(kernel: Kernel) -> Kernel:
    """`kernel` under context parallelism."""
    return Kernel("context", inner=kernel, joint=False, apart=True, mask=kernel.mask)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The kernels of a model in one mode, and how they get the rows of a micro-batch."""

    columns: Kernel  # self-attention's
    keys: Kernel | None  # cross-attention's; None where no layer has any
    rows: Rows


def choose(config: Config, machine: Machine, mode: Mode) -> Chosen:
    """The kernels of `config` on `machine` in `mode`. Outside training masks of all pairs are quick enough: rows are
    short, and caches hold their keys."""
    trains = mode is Mode.TRAINING
    pairs = FLEX if trains and machine.cuda else DENSE
    keys = pairs if cross_layers(config) else None
    if config.parallel.context > 1:
        return Chosen(across(pairs), keys, Rows.KEPT)
    whole = PER_SAMPLE if not machine.cuda else TE if uses_engine(config, machine) else FLEX
    return Chosen(whole if trains else DENSE, keys, _rows(whole, keys, trains))


def _rows(whole: Kernel, keys: Kernel | None, trains: bool) -> Rows:
    if whole.rows is Rows.LINE:
        return Rows.LINE  # in all modes: Transformer Engine's fused rotary embedding takes one row
    # In one line, a mask of all pairs of tokens and keys would be larger by the number of rows.
    return whole.rows if trains and keys is None else Rows.KEPT


def uses_engine(config: Config, machine: Machine) -> bool:
    """Whether the decoder layers are Transformer Engine's.

    Adapted linears are Megatron's own; fp32 is for comparisons, which are to be made with torch's arithmetic.
    """
    return machine.cuda and machine.te and config.precision.dtype == "bf16" and config.peft.name == "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What kernels keep beside the inputs of linears. Zeros: nothing of it."""

    norm: int = 0  # bytes an element of a norm's input; 0: as it is
    normalized: int = 0  # bytes an element, beside a norm's input where the norm learns
    attention: int = 0  # bytes an element; 0: as it is
    apart: bool = False  # self-attention's output is copied for the linear behind it
    apart_keys: bool = False  # cross-attention's
    joint: bool  # values are a view of queries, keys and values in one
    rotary: bool  # cosines and sines, of queries and keys each; else their angles, once for all layers
    glu: int = 2  # widths that the gated unit keeps between its linears
    dense: bool = False  # self-attention's mask of all pairs
    dense_keys: bool = False  # cross-attention's
    fused_norm: bool  # a norm is one with its linear: what is recomputed begins in front of it


def kernels_of(config: Config, machine: Machine = GPU_WITH_TE) -> Kernels:
    """What the kernels that train `config` on `machine` keep."""
    chosen, te = choose(config, machine, Mode.TRAINING), uses_engine(config, machine)
    columns, keys = chosen.columns, chosen.keys
    return Kernels(
        joint=columns.joint,
        apart=columns.apart,
        apart_keys=keys is not None and keys.apart,
        dense=columns.mask,
        dense_keys=keys is not None and keys.mask,
        rotary=not te,
        fused_norm=te,
    )
