"""What the entries of a published config.json mean where it leaves them out: what the classes that read it default to.

The configurations of Qwen2, Qwen3, Llama and Mistral are transformers' (a test compares the tables with the installed
version; Yi, Vicuna and Qwen2.5 have the classes of Llama and Qwen2).
InternVLChatConfig is InternVL's, of which NVLM-D-72B has a copy. An encoder's defaults: vision/encoders.
"""

from __future__ import annotations

from collections.abc import Mapping

_SHAPES = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
_DECODER = dict(**_SHAPES, hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10000.0)
QWEN2 = _DECODER | dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
    use_sliding_window=False,
)  # fmt: skip
LLAMA = _DECODER | dict(
    vocab_size=32000, intermediate_size=11008, num_key_value_heads=None, max_position_embeddings=2048,
    attention_bias=False, mlp_bias=False,
)  # fmt: skip
QWEN3 = QWEN2 | dict(head_dim=128, attention_bias=False)
MISTRAL = _DECODER | dict(
    vocab_size=32000, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072,
)  # fmt: skip
MISTRAL_WINDOW = 4096  # where sliding_window is left out; null means that all earlier tokens are seen
INTERNVL = dict(downsample_ratio=0.5, ps_version="v1", select_layer=-1)

# transformers' classes of llava-hf, and what they read of the encoder unless told otherwise.
LLAVA_HF = {
    "LlavaOnevisionForConditionalGeneration": dict(vision_feature_layer=-1, vision_feature_select_strategy="full"),
    **dict.fromkeys(
        (
            "LlavaForConditionalGeneration",
            "LlavaNextForConditionalGeneration",
            "LlavaNextVideoForConditionalGeneration",
        ),
        dict(vision_feature_layer=-2, vision_feature_select_strategy="default"),
    ),
}
LLAVA = {  # the original classes, by those of their language models, whose entries their config.json has
    "LlavaLlamaForCausalLM": "LlamaForCausalLM",
    "LlavaMistralForCausalLM": "MistralForCausalLM",
    "LlavaQwenForCausalLM": "Qwen2ForCausalLM",
}

LANGUAGES = {
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
}
_MODEL_TYPES = {name.removesuffix("ForCausalLM").lower(): name for name in LANGUAGES}

# Entries that change what a model computes, and the one value that changes nothing: nothing else is built.
FIXED_LANGUAGE = dict(
    hidden_act="silu", mlp_bias=False, use_sliding_window=False, partial_rotary_factor=1, is_causal=True,
    attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=None, clip_qkv=None,
    embedding_multiplier=1, residual_multiplier=1, attention_multiplier=None, logits_scaling=1, logit_scale=1,
    scale_emb=1, scale_depth=None, dim_model_base=None, use_qk_norm=False, qk_layernorm=False, qk_norm=False,
    no_rope_layers=None, use_logn_attn=False, use_dynamic_ntk=False, rope_ratio=1, alibi=False,
    quantization_config=None, compression_config=None,
)  # fmt: skip
FIXED_LLAMA = FIXED_LANGUAGE | dict(attention_bias=False)  # Qwen2's and Mistral's classes ignore it
FIXED_LLAVA = dict(
    mm_vision_select_layer=-2, mm_vision_select_feature="patch", mm_use_im_start_end=False, mm_resampler_type=None,
)  # fmt: skip
FIXED_LLAVA_HF = dict(projector_hidden_act="gelu", multimodal_projector_bias=True, quantization_config=None)
FIXED_VILA = dict(s2=False, dynamic_s2=False, quantization_config=None)
FIXED_WHOLE = dict(ps_version="v2", select_layer=-1, quantization_config=None, use_backbone_lora=0, use_llm_lora=0)


def architecture_of(values: Mapping) -> str | None:
    """The class that a language model's config.json is for: NVLM-D-72B says model_type=llama of a Qwen2."""
    named = [name for name in values.get("architectures") or [] if name in LANGUAGES]
    if values.get("architectures"):
        return named[0] if named else None
    return _MODEL_TYPES.get(values.get("model_type", ""))


def completed(values: Mapping, defaults: Mapping) -> dict:
    """`values` with what they leave out, or give as null."""
    return {**defaults, **{name: value for name, value in values.items() if value is not None}}
