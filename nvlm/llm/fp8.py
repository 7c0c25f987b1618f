"""FP8: weights that are kept only in it, scales that evaluation leaves as they are. Imported only if Transformer
Engine is in use (nvlm.llm.backend)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from transformer_engine.pytorch import LayerNormLinear, Linear
from transformer_engine.pytorch.fp8 import DelayedScalingRecipeState, FP8GlobalStateManager
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


def keep_in_fp8(block: TransformerBlock) -> None:
    """Turn the trainable weights of `block`'s FP8 linears into FP8 tensors.

    Their original values are preserved for the optimizer's fp32 master weights. Call it after everything that writes
    weights and before the DDP wrap, which moves the weights into its buffers.
    """
    settings = dataclasses.replace(block.config, fp8_param=True)
    for layer in block.layers:
        with get_fp8_context(settings, layer.layer_number - 1, is_init=True):
            if not FP8GlobalStateManager.with_fp8_parameters():
                continue  # one of the first or last layers, which compute in bf16
            for module in layer.modules():
                if isinstance(module, Linear | LayerNormLinear) and module.weight.requires_grad:
                    _quantize(module)


def _quantize(linear: Linear | LayerNormLinear) -> None:
    kept = {name: (p.requires_grad, vars(p).copy()) for name, p in linear.named_parameters(recurse=False)}
    for meta in linear.param_init_meta.values():
        meta.init_fn = _as_it_is
    linear.primary_weights_in_fp8 = linear.preserve_high_precision_init_val = True
    linear.init_fp8_metadata()
    TransformerEngineBaseModule.reset_parameters(linear)  # initializes, quantizes, keeps a copy for the optimizer
    for name, (learns, megatrons) in kept.items():
        parameter = linear.get_parameter(name).requires_grad_(learns)
        vars(parameter).update(megatrons)


@contextmanager
def scales_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A block whose forward passes leave no trace in the scaling history of delayed FP8."""
    layers = [module for module in modules if isinstance(module, TransformerEngineBaseModule)]
    before = {id(state): [tensor.clone() for tensor in _tensors(state)] for state in _histories(layers)}
    try:
        yield
    finally:
        for state in _histories(layers):
            history, scale = _tensors(state)
            if id(state) in before:
                for tensor, value in zip((history, scale), before[id(state)]):
                    tensor.copy_(value)
            else:  # it was made in the block
                history.zero_()
                scale.fill_(1.0)


def _histories(layers: Iterable[TransformerEngineBaseModule]) -> Iterator[DelayedScalingRecipeState]:
    for layer in layers:
        states = (layer.fp8_meta.get(f"scaling_{way}") for way in ("fwd", "bwd"))
        yield from (state for state in states if isinstance(state, DelayedScalingRecipeState))


def _tensors(state: DelayedScalingRecipeState) -> tuple[Tensor, Tensor]:
    return state.amax_history, state.scale


def _as_it_is(weight: Tensor) -> None:
    """An initializer that leaves the weight unchanged."""
