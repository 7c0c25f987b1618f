"""The language model's Megatron configuration and layer specs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.utils import init_method_normal
from torch import nn

from nvlm.attention.choice import Mode, Rows, choose
from nvlm.attention.model import build_attention
from nvlm.config.values import Config, cross_layers
from nvlm.llm import backend
from nvlm.llm.adapters import linears_of
from nvlm.llm.backend import engine, fp8_settings, uses_te
from nvlm.llm.layer import ColumnAttention, DecoderLayer, SeededLayer
from nvlm.llm.norm import RMSNorm
from nvlm.llm.swiglu import SwiGLU
from nvlm.processes import device

# Name of a norm's weight when fused into a linear, and its name as a separate norm.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "cross_attention.linear_q.layer_norm_": "pre_cross_attn_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# Megatron's settings by train.recompute. The MLP holds two thirds of a layer's activations.
_RECOMPUTE = {
    "none": {},
    "selective": dict(recompute_granularity="selective", recompute_modules=["mlp"]),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}


def base_config(config: Config, **shape) -> TransformerConfig:
    """Settings shared by all Megatron modules; `shape` gives the rest."""
    dtype, cuda = DTYPES[config.precision.dtype], device.has_cuda()
    meta = torch.empty(0).is_meta  # under a meta device, which Megatron's GPU initialization ignores
    return TransformerConfig(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=meta or not cuda,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,  # without bias and dropout, it would be a compiled function around one addition
        # Fusions take minutes to compile on CPU; gradient fusion in Megatron's own linears needs Apex.
        **(dict(bias_activation_fusion=cuda, gradient_accumulation_fusion=False) | shape),
    )


def llm_config(config: Config) -> TransformerConfig:
    """The TransformerConfig of the language model under `config`'s layout."""
    llm, p = config.llm, config.parallel
    line = choose(config, backend.this_machine(), Mode.TRAINING).rows is Rows.LINE
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
        use_te_activation_func=not device.has_cuda(),  # in Megatron: use the activation module of the spec, here SwiGLU
        normalization="RMSNorm",
        layernorm_epsilon=llm.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=llm.qkv_bias,
        qk_layernorm=llm.qk_norm,  # Megatron sums their gradients: each tensor-parallel rank has some heads
        init_method_std=llm.init_std,
        embedding_init_method=init_method_normal(llm.embedding_std),
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual if p.virtual > 1 else None,
        # Megatron does not require the last two, but without them each rank would attend only to its own columns.
        context_parallel_size=p.context,
        hierarchical_context_parallel_sizes=list(p.context_mesh) if p.context > 1 else None,
        cp_comm_type="a2a+p2p" if p.context > 1 else None,
        sequence_parallel=p.sequence,
        tp_comm_overlap=p.userbuffers,
        # The gradient of a linear's input is scattered behind the product of its weight's gradient. A frozen weight has
        # none, and Transformer Engine would not scatter at all; so it goes behind the product that makes it.
        tp_comm_overlap_rs_dgrad=p.userbuffers and frozen(config),
        # Messages between two ranks are matched in the order of posting. If the previous stage is also the next one,
        # batched sends and receives in both directions would be mismatched, silently.
        overlap_p2p_comm=p.virtual > 1,
        batch_p2p_comm=p.virtual == 1,
        # Row lengths may vary: train.step knows when. Megatron then requires this dispatcher, even without experts.
        variable_seq_lengths=p.pipeline > 1,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        **_RECOMPUTE[config.train.recompute],
        **fp8_settings(config),
        # The fused kernels support only one row. The second splits queries, keys and values as well, without norms.
        apply_rope_fusion=line,
        fused_single_qkv_rope=line and not llm.qk_norm,
        gradient_accumulation_fusion=uses_te(config),
        # Offloaded layer by layer; the last layer is needed again immediately.
        cpu_offloading=config.train.offload,
        cpu_offloading_num_layers=llm.layers - 1 if config.train.offload else 0,
        hetereogenous_dist_checkpoint=True,  # some layers have cross-attention, others not
        perform_initialization=not (config.init.llm or config.init.release or config.init.checkpoint),  # loaded instead
    )


def frozen(config: Config) -> bool:
    """Whether the weights of the decoder's own linears do not learn."""
    return not config.stage.train_llm or "llm" in config.adapted


def layer_spec(config: Config, number: int, cross_attention: ModuleSpec | None = None) -> ModuleSpec:
    """Decoder layer `number`; `cross_attention`, with its own norm, goes between self-attention and the MLP."""
    cross, linears = {}, linears_of(config, "llm", number)
    if cross_attention is not None:
        params = cross_attention.params | {"linears": linears_of(config, "xattn", number)}
        cross = dict(
            pre_cross_attn_layernorm=linears.norm,
            cross_attention=ModuleSpec(cross_attention.module, params),
            cross_attn_bda=get_bias_dropout_add,
        )
    return ModuleSpec(
        module=SeededLayer if linears.te else DecoderLayer,
        params={"seed": config.seed, "number": number},
        submodules=TransformerLayerSubmodules(
            input_layernorm=linears.norm,
            self_attention=ModuleSpec(
                module=ColumnAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.normed("self_attention.linear_qkv"),
                    **dict.fromkeys(("q_layernorm", "k_layernorm"), _norm(config) if config.llm.qk_norm else None),
                    core_attention=build_attention(config, backend.this_machine(), Mode.TRAINING).core,
                    linear_proj=linears.row("self_attention.linear_proj"),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=linears.norm,
            mlp=ModuleSpec(
                MLP,
                submodules=MLPSubmodules(
                    linear_fc1=linears.normed("mlp.linear_fc1"),
                    activation_func=SwiGLU,
                    linear_fc2=linears.row("mlp.linear_fc2"),
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=FUSED_NORMS if linears.te else {},
            **cross,
        ),
    )


def block_submodules(config: Config, layers: range, cross_attention: ModuleSpec | None) -> TransformerBlockSubmodules:
    """Specs of the layers (0-based) on this pipeline stage, and of the final norm."""
    carriers = cross_layers(config)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, n, cross_attention if n + 1 in carriers else None) for n in layers],
        layer_norm=_norm(config),
    )


def _norm(config: Config) -> Callable[..., nn.Module]:
    """Builder of norms that are not fused with a linear."""
    return engine().TENorm if uses_te(config) else RMSNorm
