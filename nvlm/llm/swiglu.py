"""SwiGLU in few passes over memory, for the MLP on CPU, where Megatron's fused version is not compiled.

Shapes: F inner width of the MLP on this rank.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """[..., 2 F], gate before up, to silu(gate) * up [..., F] (Megatron's builder signature)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """Writes both gradients into one tensor. Autograd would compute them apart and join them, in twice the time."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = nn.functional.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        of_gate, of_up = out.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return out
