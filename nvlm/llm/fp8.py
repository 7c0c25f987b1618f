"""Weights that are kept only in FP8. Imported only if Transformer Engine is in use (nvlm.llm.backend)."""

from __future__ import annotations

import dataclasses

from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from transformer_engine.pytorch import LayerNormLinear, Linear
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
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


def _as_it_is(weight: Tensor) -> None:
    """An initializer that leaves the weight unchanged."""
