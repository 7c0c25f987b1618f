"""InternViT in Megatron-Core modules (InternViT-6B-448px-V1-5: NVLM section 4.1; tiny: the same at toy size).

Pre-norm blocks with layer scale, a class token that is dropped at the end, no final norm. The 6B model uses RMSNorm,
also for queries and keys over the full width, and no qkv bias; the 300M model uses LayerNorm, no QK norm, and a bias.

Shapes: T tiles, P patches (1024 at full size), D encoder width, px tile side in pixels.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from nvlm.config.values import Config
from nvlm.vision.encoders.layers import build_layers, encoder_config, layer_spec


class _LayerScale(nn.Module):
    """Per-channel factors of a branch, applied before the residual addition (HF: ls1, ls2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((config.hidden_size,), 0.1, dtype=config.params_dtype))

    def forward(self, branch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
        output, bias = branch
        return (output if bias is None else output + bias) * self.weight, None


class ScaledSelfAttention(SelfAttention):
    """Self-attention whose output is scaled channel by channel."""

    def __init__(self, config: TransformerConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        if not config.add_qkv_bias:  # Megatron gives the qkv linear a bias whenever other linears have one
            self.linear_qkv.bias = None
        self.layer_scale = _LayerScale(config)

    def forward(self, *args, **kwargs):
        return self.layer_scale(super().forward(*args, **kwargs))


class ScaledMLP(MLP):
    """MLP whose output is scaled channel by channel."""

    def __init__(self, config: TransformerConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        self.layer_scale = _LayerScale(config)

    def forward(self, *args, **kwargs):
        return self.layer_scale(super().forward(*args, **kwargs))


class InternViT(MegatronModule):
    """Normalised pixels [T, 3, px, px] to patch features [T, P, D] of the last layer."""

    def __init__(self, config: Config, groups: ProcessGroupCollection) -> None:
        vision = config.vision
        super().__init__(config=encoder_config(config))
        dtype, patches = self.config.params_dtype, vision.patches
        self.patch_embedding = nn.Conv2d(3, vision.hidden, vision.patch, vision.patch, dtype=dtype)
        self.class_embedding = nn.Parameter(torch.randn(1, 1, vision.hidden, dtype=dtype) * 0.02)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + patches, vision.hidden, dtype=dtype) * 0.02)
        self.decoder = build_layers(self.config, layer_spec(vision, ScaledSelfAttention, ScaledMLP), groups)

    def forward(self, pixels_T3: Tensor) -> Tensor:
        """[T, P, D], without the class token."""
        patches_TPD = self.patch_embedding(pixels_T3.to(self.config.params_dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_embedding.expand(len(patches_TPD), -1, -1), patches_TPD), dim=1)
        hidden_STD = (tokens + self.position_embedding).transpose(0, 1).contiguous()
        return self.decoder(hidden_STD, attention_mask=None)[1:].transpose(0, 1)
