"""FP8: weights that are kept only in it, scales that evaluation leaves as they are. Imported only if Transformer
Engine is in use (nvlm.llm.backend)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from megatron.core.fp8_utils import get_fp8_context, is_float8tensor
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from transformer_engine.pytorch import LayerNormLinear, Linear
from transformer_engine.pytorch.constants import FP8FwdTensorIdx
from transformer_engine.pytorch.fp8 import DelayedScalingRecipeState, FP8GlobalStateManager
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.quantized_tensor import Quantizer
from transformer_engine.pytorch.tensor import Float8Quantizer

from nvlm.llm.adapters import Adapted


def keep_in_fp8(block: TransformerBlock, trained: bool) -> None:
    """Turn weights of `block`'s FP8 linears into FP8 tensors: those beside adapters, and if `trained` those that learn.

    Their original values stay in host memory: of trained ones for the optimizer's fp32 master weights, of frozen ones
    for the checkpoint. Call it after everything that writes weights and before the DDP wrap, which moves the weights
    into its buffers.
    """
    settings = dataclasses.replace(block.config, fp8_param=True)
    for layer in block.layers:
        with get_fp8_context(settings, layer.layer_number - 1, is_init=True):
            if not FP8GlobalStateManager.with_fp8_parameters():
                continue  # one of the first or last layers, which compute in bf16
            for module in layer.modules():
                if isinstance(module, Adapted) or (trained and _learns(module)):
                    _quantize(module)


def _learns(module: nn.Module) -> bool:
    return isinstance(module, Linear | LayerNormLinear) and module.weight.requires_grad


def _quantize(linear: Linear | LayerNormLinear) -> None:
    kept = {name: (p.requires_grad, vars(p).copy()) for name, p in linear.named_parameters(recurse=False)}
    for meta in linear.param_init_meta.values():
        meta.init_fn = _as_it_is
    linear.primary_weights_in_fp8 = linear.preserve_high_precision_init_val = True
    linear.init_fp8_metadata()
    if not linear.weight.requires_grad:
        _scale_to(linear.weight, linear.quantizers["scaling_fwd"][FP8FwdTensorIdx.GEMM1_WEIGHT])
    TransformerEngineBaseModule.reset_parameters(linear)  # initializes, quantizes, keeps a copy for the optimizer
    for name, (learns, megatrons) in kept.items():
        parameter = linear.get_parameter(name).requires_grad_(learns)
        vars(parameter).update(megatrons)


def _scale_to(weight: Tensor, quantizer: Quantizer) -> None:
    """Fit the scale to a weight that will not be quantized again. Delayed scaling would use 1, before any history."""
    if isinstance(quantizer, Float8Quantizer):
        amax = weight.detach().abs().max().float()
        quantizer.scale.copy_(torch.where(amax > 0, torch.finfo(torch.float8_e4m3fn).max / amax, 1.0))


@torch.no_grad()
def take_originals(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set the frozen weights of `module` that are kept only in FP8, and their originals, to `tensors`, by name."""
    for name, weight in module.named_parameters():
        if is_float8tensor(weight) and not weight.requires_grad:
            _scale_to(tensors[name], weight._quantizer)
            weight.quantize_(tensors[name].to(weight.device))
            weight.get_high_precision_init_val().copy_(tensors[name])


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
