"""Which attention kernels a model uses, and what kernels keep for the backward pass. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm.config.values import Config


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


# Transformer Engine's layers, and without it (adapters, fp32) Megatron's on torch's kernels; on a GPU.
ENGINE = Kernels(joint=False, rotary=False, fused_norm=True)
TORCH = Kernels(joint=True, rotary=True, fused_norm=False)


def kernels_of(config: Config) -> Kernels:
    """Those that a GPU run of `config` has where Transformer Engine is installed."""
    return ENGINE if config.precision.dtype == "bf16" and config.peft.name == "none" else TORCH
