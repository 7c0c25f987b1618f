"""The language model's Megatron configuration and layer specs."""

from __future__ import annotations

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.utils import init_method_normal

from nvlm import device
from nvlm.config import Config, cross_layers
from nvlm.llm.adapters import linears_of
from nvlm.llm.attention import CoreAttention
from nvlm.llm.context import ContextAttention
from nvlm.llm.layer import DecoderLayer
from nvlm.llm.norm import RMSNorm
from nvlm.llm.swiglu import SwiGLU

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def base_config(config: Config, **shape) -> TransformerConfig:
    """What every Megatron module of the project shares; `shape` says the rest."""
    dtype = DTYPES[config.precision]
    return TransformerConfig(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not device.has_cuda(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **shape,
    )


def llm_config(config: Config) -> TransformerConfig:
    """The TransformerConfig of the language model under `config`'s layout."""
    llm, p = config.llm, config.parallel
    return base_config(
        config,
        num_layers=llm.layers,
        hidden_size=llm.hidden,
        num_attention_heads=llm.heads,
        num_query_groups=llm.kv_heads,
        kv_channels=llm.head_dim,
        ffn_hidden_size=llm.ffn,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_te_activation_func=not device.has_cuda(),  # Megatron's name for: the spec brings one, here SwiGLU
        normalization="RMSNorm",
        layernorm_epsilon=llm.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=llm.qkv_bias,
        init_method_std=llm.init_std,
        embedding_init_method=init_method_normal(llm.embedding_std),
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual if p.virtual > 1 else None,
        # Megatron does not check these two: without them each rank would attend to its own columns alone.
        context_parallel_size=p.context,
        hierarchical_context_parallel_sizes=list(p.context_mesh) if p.context > 1 else None,
        cp_comm_type="a2a+p2p" if p.context > 1 else None,
        sequence_parallel=p.sequence,
        # Between two ranks messages pair by the order in which they are posted, so a batch of sends and receives in
        # both directions gives wrong numbers without a word where the stage before is also the stage behind.
        overlap_p2p_comm=p.virtual > 1,
        batch_p2p_comm=p.virtual == 1,
        # Rows have any length; Megatron ties that switch to a dispatcher name although there are no experts here.
        variable_seq_lengths=p.pipeline > 1,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        recompute_granularity="full" if config.train.recompute == "full" else None,
        recompute_method="uniform" if config.train.recompute == "full" else None,
        recompute_num_layers=1 if config.train.recompute == "full" else None,
        hetereogenous_dist_checkpoint=True,  # layers with and without cross-attention
        perform_initialization=not (config.init.llm or config.init.release or config.init.checkpoint),  # read instead
    )


def layer_spec(config: Config, number: int, cross_attention: ModuleSpec | None = None) -> ModuleSpec:
    """Decoder layer `number`; `cross_attention` stands between self-attention and the MLP, behind its own norm."""
    cross, linears = {}, linears_of(config, "llm", number)
    if cross_attention is not None:
        params = cross_attention.params | {"linears": linears_of(config, "xattn", number)}
        cross = dict(
            pre_cross_attn_layernorm=RMSNorm,
            cross_attention=ModuleSpec(cross_attention.module, params),
            cross_attn_bda=get_bias_dropout_add,
        )
    return ModuleSpec(
        module=DecoderLayer,
        params={"seed": config.seed, "number": number},
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.column("self_attention.linear_qkv"),
                    core_attention=ContextAttention if config.parallel.context > 1 else CoreAttention,
                    linear_proj=linears.row("self_attention.linear_proj"),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                MLP,
                submodules=MLPSubmodules(
                    linear_fc1=linears.column("mlp.linear_fc1"),
                    activation_func=SwiGLU,
                    linear_fc2=linears.row("mlp.linear_fc2"),
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            **cross,
        ),
    )


def block_submodules(config: Config, layers: range, cross_attention: ModuleSpec | None) -> TransformerBlockSubmodules:
    """Specs of the layers `layers` (0-based) that this pipeline stage holds, and the final norm."""
    carriers = cross_layers(config)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, n, cross_attention if n + 1 in carriers else None) for n in layers],
        layer_norm=RMSNorm,
    )
