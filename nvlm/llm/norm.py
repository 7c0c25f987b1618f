"""Norms for layer specs. Megatron's torch norm refuses sequence parallelism; these mark their weights for it."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn


def _mark(module: nn.Module, config: TransformerConfig) -> None:
    # With sequence parallelism each rank sees part of the sequence; Megatron sums the gradients of marked weights.
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's RMSNorm over the last dimension, `weight` [D]; on CPU, without gradients, in half of its passes."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return nn.functional.rms_norm(x, weight.shape, weight, eps)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return (x * squares.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension (Megatron's layer-norm builder signature)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        _mark(self, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension (Megatron's layer-norm builder signature)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        _mark(self, config)


class FullWidthRMSNorm(nn.Module):
    """RMSNorm over all heads together, not head by head (an encoder's QK-norm). Input and output [..., N, D]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(config.num_attention_heads * hidden_size, dtype=config.params_dtype))

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        flat = x_ND.flatten(-2)
        return nn.functional.rms_norm(flat, (flat.shape[-1],), self.weight, self.eps).view_as(x_ND)
