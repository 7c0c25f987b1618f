"""Encoder layers in Megatron-Core modules: pre-norm self-attention and MLP, which see all tokens of a tile."""

from __future__ import annotations

import functools
from collections.abc import Callable

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from nvlm.attention.kernels.dense import WholeAttention
from nvlm.config.values import Config, VisionConfig
from nvlm.llm.build import base_config
from nvlm.llm.norm import FullWidthRMSNorm, LayerNorm, RMSNorm


def encoder_config(config: Config, activation: Callable[[Tensor], Tensor] = nn.functional.gelu) -> TransformerConfig:
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
        activation_func=activation,
        bias_activation_fusion=False,  # Megatron's fused GELU is an approximation
        normalization={"rms": "RMSNorm", "layer": "LayerNorm"}[vision.norm],
        layernorm_epsilon=vision.norm_eps,
        qk_layernorm=vision.qk_norm,
        add_bias_linear=True,
        add_qkv_bias=vision.qkv_bias,
        perform_initialization=not (init.vision or init.release or init.checkpoint),  # loaded instead
    )


def layer_spec(
    vision: VisionConfig, attention: type[SelfAttention] = SelfAttention, mlp: type[MLP] = MLP
) -> ModuleSpec:
    """The spec of one layer with the modules `attention` and `mlp`."""
    norm = {"rms": RMSNorm, "layer": LayerNorm}[vision.norm]
    heads = dict(q_layernorm=FullWidthRMSNorm, k_layernorm=FullWidthRMSNorm) if vision.qk_norm else {}
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=attention,
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
            mlp=functools.partial(mlp.as_mlp_submodule, submodules=linears),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build_layers(described: TransformerConfig, spec: ModuleSpec, groups: ProcessGroupCollection) -> TransformerBlock:
    """All layers, without a final norm. Input and output are [S, T, D]: tokens of a tile, tiles, width."""
    return TransformerBlock(
        described,
        TransformerBlockSubmodules(layer_specs=[spec] * described.num_layers, layer_norm=RMSNorm),
        post_layer_norm=False,
        pg_collection=groups,
    )
