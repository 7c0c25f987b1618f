"""Whose modules the layers are made of: Transformer Engine's on a GPU where it loads, else Megatron's and torch's.

Imports Transformer Engine only where it is asked for: that takes seconds, and a broken one can fail in many ways.
"""

from __future__ import annotations

import functools

from nvlm.attention import choice
from nvlm.config.values import TE_INSTALL, Config, problem
from nvlm.processes import device

_AMAX_HISTORY = 1024  # steps whose largest values decide a delayed scale


def uses_te(config: Config) -> bool:
    """Whether the decoder layers are Transformer Engine's on this machine."""
    return choice.uses_engine(config, this_machine())


def this_machine() -> choice.Machine:
    """What attention kernels are chosen by."""
    cuda = device.has_cuda()
    return choice.Machine(cuda=cuda, te=cuda and why_not_te() is None)


@functools.cache
def why_not_te() -> str | None:
    """None where Transformer Engine loads, else the reason in one line."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # an ImportError, an OSError of a library, a RuntimeError of its own checks
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no reason'}"
    return None


def check_precision(config: Config) -> None:
    """Raise ConfigError where this machine cannot compute in config.precision: no GPU, no Transformer Engine, or a
    recipe that one of them does not have. Offload needs both, too."""
    precision = config.precision
    if config.train.offload and (why_not_te() or not device.has_cuda()):
        got = f"no Transformer Engine ({why_not_te()})" if why_not_te() else "a machine without a usable GPU"
        raise problem("train.offload=true", got, "Transformer Engine on a GPU", f"{TE_INSTALL}, or train.offload=false")
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
    """Transformer Engine's own words on why it does not have a recipe here; None where it does."""
    from transformer_engine import __version__, pytorch

    asks = {"fp8_blockwise": "is_fp8_block_scaling_available", "mxfp8": "is_mxfp8_available"}
    ask = getattr(pytorch, asks.get(name, "is_fp8_available"), None)
    if ask is None:
        return f"Transformer Engine {__version__}, which is too old for it"
    able, why = ask(return_reason=True)
    return None if able else why


def describe(config: Config) -> str:
    """One line about what the layers are made of, and why not of Transformer Engine."""
    precision = config.precision.name
    if uses_te(config):
        from transformer_engine import __version__

        return f"layers: Transformer Engine {__version__}, {precision}"
    if not device.has_cuda():
        return f"layers: torch on CPU, {precision}"
    reason = why_not_te()
    why = f"no Transformer Engine: {reason}; {TE_INSTALL} makes it faster" if reason else "as fp32 and adapters need it"
    return f"layers: torch and Megatron-Core, {precision} ({why})"


def frozen_recipe(name: str) -> object:
    """Transformer Engine's recipe for a module that never learns, under the precision `name`. A history of scales is
    kept by backward passes: without any, each tensor gets a scale of its own."""
    from transformer_engine.common import recipe

    kinds = {"fp8_blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}
    return getattr(recipe, kinds.get(name, "Float8CurrentScaling"))()


def fp8_settings(config: Config) -> dict:
    """The fields of Megatron's TransformerConfig that say which FP8 the decoder's layers compute in."""
    precision = config.precision
    if precision.recipe is None or not uses_te(config):
        return {}
    return dict(
        # Gradients need a wider range than four bits of exponent where a whole tensor shares one scale.
        fp8="e4m3" if precision.name in ("fp8_blockwise", "mxfp8") else "hybrid",
        fp8_recipe=precision.recipe,
        fp8_amax_history_len=_AMAX_HISTORY,
        fp8_amax_compute_algo="max",
        first_last_layers_bf16=precision.edges > 0,
        num_layers_at_start_in_bf16=precision.edges,
        num_layers_at_end_in_bf16=precision.edges,
    )


def engine():
    """Megatron's wrappers of Transformer Engine's modules."""
    from megatron.core.extensions import transformer_engine

    return transformer_engine
