"""Weights that are kept in FP8 alone. Imported only where Transformer Engine is chosen (nvlm.llm.backend)."""

from __future__ import annotations

import dataclasses

from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from transformer_engine.pytorch import LayerNormLinear, Linear
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


def keep_in_fp8(block: TransformerBlock) -> None:
    """Turn the weights of the linears of `block` that learn and are multiplied in FP8 into FP8 tensors.

    The optimizer finds what they were, and keeps that in fp32. Call it behind everything that writes weights, and
    before the DDP wrap, whose buffers they then lie in.
    """
    settings = dataclasses.replace(block.config, fp8_param=True)
    for layer in block.layers:
        with get_fp8_context(settings, layer.layer_number - 1, is_init=True):
            if not FP8GlobalStateManager.with_fp8_parameters():
                continue  # a layer at one of the ends that computes in bf16
            for module in layer.modules():
                if isinstance(module, Linear | LayerNormLinear) and module.weight.requires_grad:
                    _quantize(module)


def _quantize(linear: Linear | LayerNormLinear) -> None:
    kept = {name: (p.requires_grad, vars(p).copy()) for name, p in linear.named_parameters(recurse=False)}
    for first in linear.param_init_meta.values():
        first.init_fn = _as_it_is
    linear.primary_weights_in_fp8 = linear.preserve_high_precision_init_val = True
    linear.init_fp8_metadata()
    TransformerEngineBaseModule.reset_parameters(linear)  # which draws, quantizes, and keeps a copy for the optimizer
    for name, (learns, megatrons) in kept.items():
        parameter = linear.get_parameter(name).requires_grad_(learns)
        vars(parameter).update(megatrons)


def _as_it_is(weight: Tensor) -> None:
    """In place of drawing first weights."""
