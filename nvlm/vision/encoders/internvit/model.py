"""InternViT in Megatron-Core modules (InternViT-6B-448px-V1-5: NVLM section 4.1; tiny: the same at toy size).

Pre-norm blocks with layer scale, a class token that is dropped at the end, no final norm. The 6B model uses RMSNorm,
also for queries and keys over the full width, and no qkv bias; the 300M model uses LayerNorm, no QK norm, and a bias.

Shapes: T tiles, P patches (1024 at full size), D encoder width, px tile side in pixels.
"""

from __future__ import annotations

import functools

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from nvlm.attention.kernels.dense import WholeAttention
from nvlm.config.values import Config, VisionConfig
from nvlm.llm.build import base_config
from nvlm.llm.norm import FullWidthRMSNorm, LayerNorm, RMSNorm


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


def encoder_config(config: Config) -> TransformerConfig:
    """The TransformerConfig of the encoder, which is not sharded."""
    vision, init = config.vision, config.init
    return base_config(
        config,
        num_layers=vision.layers,
        hidden_size=vision.hidden,
        num_attention_heads=vision.heads,
        num_query_groups=vision.heads,
        kv_channels=vision.hidden // vision.heads,
        ffn_hidden_size=vision.ffn,
        activation_func=nn.functional.gelu,
        bias_activation_fusion=False,  # Megatron's fused GELU is an approximation
        normalization={"rms": "RMSNorm", "layer": "LayerNorm"}[vision.norm],
        layernorm_epsilon=vision.norm_eps,
        qk_layernorm=vision.qk_norm,
        add_bias_linear=True,
        add_qkv_bias=vision.qkv_bias,
        perform_initialization=not (init.vision or init.release or init.checkpoint),  # loaded instead
    )


def _layer_spec(vision: VisionConfig) -> ModuleSpec:
    norm = {"rms": RMSNorm, "layer": LayerNorm}[vision.norm]
    heads = dict(q_layernorm=FullWidthRMSNorm, k_layernorm=FullWidthRMSNorm) if vision.qk_norm else {}
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=ScaledSelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=WholeAttention,
                    linear_proj=RowParallelLinear,
                    **heads,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=functools.partial(ScaledMLP.as_mlp_submodule, submodules=linears),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class InternViT(MegatronModule):
    """Normalised pixels [T, 3, px, px] to patch features [T, P, D] of the last layer."""

    def __init__(self, config: Config, groups: ProcessGroupCollection) -> None:
        vision = config.vision
        super().__init__(config=encoder_config(config))
        dtype, patches = self.config.params_dtype, (vision.tile_size // vision.patch) ** 2
        self.patch_embedding = nn.Conv2d(3, vision.hidden, vision.patch, vision.patch, dtype=dtype)
        self.class_embedding = nn.Parameter(torch.randn(1, 1, vision.hidden, dtype=dtype) * 0.02)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + patches, vision.hidden, dtype=dtype) * 0.02)
        self.decoder = TransformerBlock(
            self.config,
            TransformerBlockSubmodules(layer_specs=[_layer_spec(vision)] * vision.layers, layer_norm=RMSNorm),
            post_layer_norm=False,
            pg_collection=groups,
        )

    def forward(self, pixels_T3: Tensor) -> Tensor:
        """[T, P, D], without the class token."""
        patches_TPD = self.patch_embedding(pixels_T3.to(self.config.params_dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_embedding.expand(len(patches_TPD), -1, -1), patches_TPD), dim=1)
        hidden_STD = (tokens + self.position_embedding).transpose(0, 1).contiguous()
        return self.decoder(hidden_STD, attention_mask=None)[1:].transpose(0, 1)
