"""Rotary positions per token: each sample of a packed row starts at 0.

Shapes: S columns, B rows, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvlm.config.values import LLMConfig


def rotary_frequencies(llm: LLMConfig) -> Tensor:
    """[D / 2] rotary frequencies, radians per position."""
    steps = torch.arange(0, llm.head_dim, 2, dtype=torch.float32, device="cpu") / llm.head_dim
    frequencies = llm.rope_theta**-steps
    if llm.rope_scaling is not None:
        return scaled(frequencies, **llm.rope_scaling)
    return frequencies / llm.rope_interpolation  # the same angles as with divided positions


def rotary_angles(positions_BS: Tensor, frequencies: Tensor) -> Tensor:
    """[S, B, 1, D] rotary angles in radians, from each token's position within its sample."""
    angles = positions_BS.t()[..., None] * frequencies
    return torch.cat((angles, angles), dim=-1)[:, :, None, :]


def scaled(
    frequencies: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> Tensor:
    """Llama 3.1's context extension: low frequencies are divided by `factor`, high ones kept, with a ramp between."""
    turns = original_max_position_embeddings * frequencies / (2 * torch.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)
