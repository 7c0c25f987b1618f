"""Chooses the modules of the layers: Transformer Engine's on a GPU if it loads, else Megatron's and torch's.

Imports Transformer Engine only when needed: the import takes seconds, and a broken install can fail in many ways.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import TYPE_CHECKING

from nvlm.attention import choice
from nvlm.config.values import TE_INSTALL, Config, problem
from nvlm.processes import device

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

_AMAX_HISTORY = 1024  # steps of maximum values for delayed scaling


def uses_te(config: Config) -> bool:
    """Whether the decoder layers use Transformer Engine on this machine."""
    return choice.uses_engine(config, this_machine())


def this_machine() -> choice.Machine:
    """This machine, as the choice of attention kernels sees it."""
    cuda = device.has_cuda()
    te = cuda and why_not_te() is None
    return choice.Machine(cuda=cuda, te=te, packs=te and _packs())


@functools.cache
def _packs() -> bool:
    """Whether Transformer Engine's attention takes packed rows: cuDNN's from Hopper on, else that of flash-attn."""
    return device.is_hopper_or_later() or importlib.util.find_spec("flash_attn") is not None


@functools.cache
def why_not_te() -> str | None:
    """None if Transformer Engine loads, else the reason in one line."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # ImportError, OSError from a library, RuntimeError from its own checks
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no reason'}"
    return None


def check_precision(config: Config) -> None:
    """Raise ConfigError if this machine cannot run config.precision, train.offload or parallel.userbuffers.

    FP8 needs a GPU and a Transformer Engine that support the recipe; the others need both as well.
    """
    precision = config.precision
    asked = {"train.offload": config.train.offload, "parallel.userbuffers": config.parallel.userbuffers}
    for key in (key for key, value in asked.items() if value):
        if why_not_te() or not device.has_cuda():
            got = f"no Transformer Engine ({why_not_te()})" if why_not_te() else "a machine without a usable GPU"
            raise problem(f"{key}=true", got, "Transformer Engine on a GPU", f"{TE_INSTALL}, or {key}=false")
    if precision.recipe is None:
        return
    what = f"precision={precision.name}"
    if not device.has_cuda():
        raise problem(what, "a machine without a usable GPU", "Ada, Hopper or a later one", "precision=bf16")
    reason = why_not_te()
    if reason:
        raise problem(what, f"no Transformer Engine ({reason})", "one that loads", f"{TE_INSTALL}, or precision=bf16")
    refusal = _refusal(precision.name)
    if refusal:
        raise problem(what, refusal, "a GPU and a Transformer Engine that have this recipe", "precision=bf16")


def _refusal(name: str) -> str | None:
    """Transformer Engine's reason for not supporting a recipe here; None if it does."""
    from transformer_engine import __version__, pytorch

    asks = {"fp8_blockwise": "is_fp8_block_scaling_available", "mxfp8": "is_mxfp8_available"}
    ask = getattr(pytorch, asks.get(name, "is_fp8_available"), None)
    if ask is None:
        return f"Transformer Engine {__version__}, which is too old for it"
    able, why = ask(return_reason=True)
    return None if able else why


def describe(config: Config) -> str:
    """One line that says which modules the layers use, and why not Transformer Engine."""
    precision = config.precision.name
    if uses_te(config):
        from transformer_engine import __version__

        return f"layers: Transformer Engine {__version__}, {precision}"
    if not device.has_cuda():
        return f"layers: torch on CPU, {precision}"
    reason = why_not_te()
    why = f"no Transformer Engine: {reason}; {TE_INSTALL} makes it faster" if reason else "as fp32 needs it"
    return f"layers: torch and Megatron-Core, {precision} ({why})"


def frozen_recipe(name: str) -> object:
    """Transformer Engine's recipe for a frozen module under the precision `name`.

    Delayed scaling is replaced by current scaling, because backward passes maintain the history of maximum values.
    """
    from transformer_engine.common import recipe

    kinds = {"fp8_blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}
    return getattr(recipe, kinds.get(name, "Float8CurrentScaling"))()


def fp8_settings(config: Config) -> dict:
    """The FP8 fields of Megatron's TransformerConfig for the decoder layers."""
    precision = config.precision
    if precision.recipe is None or not uses_te(config):
        return {}
    return dict(
        # With one scale per tensor, gradients need a wider range than four exponent bits.
        fp8="e4m3" if precision.name in ("fp8_blockwise", "mxfp8") else "hybrid",
        fp8_recipe=precision.recipe,
        fp8_amax_history_len=_AMAX_HISTORY,
        fp8_amax_compute_algo="max",
        first_last_layers_bf16=precision.edges > 0,
        num_layers_at_start_in_bf16=precision.edges,
        num_layers_at_end_in_bf16=precision.edges,
    )


def of_megatron(te: TransformerConfig, **changes) -> TransformerConfig:
    """The configuration for modules that never use Transformer Engine, derived from that of layers that may.

    Fused accumulation of gradients in Megatron's own linears needs Apex.
    """
    return dataclasses.replace(te, gradient_accumulation_fusion=False, **changes)


def engine():
    """Megatron's wrappers of Transformer Engine modules."""
    from megatron.core.extensions import transformer_engine

    return transformer_engine
