"""config.json and preprocessor_config.json of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Mapping

from nvlm.arch.registry import description
from nvlm.config.values import Config, problem
from nvlm.export.text import Text, own_format
from nvlm.vision.encoders.interface import ExportedEncoder
from nvlm.vision.encoders.registry import ENCODERS, description_of
from nvlm.weights.published import Source


def exported_encoder(config: Config, source: Source) -> ExportedEncoder:
    """The encoder read from `source`, in export form. Raises ConfigError if no exported class supports it."""
    encoder = description_of(config.vision)
    if encoder.export is None:
        known = ", ".join(name for name, other in ENCODERS.items() if other.export is not None)
        expected = f"an encoder that modeling_nvlm.py has ({known})"
        fix = "layout=llava-hf" if encoder.hub else "answer with launch/generate.py, which needs no export"
        raise problem(f"vision.encoder={encoder.name}", "no class in an export", expected, fix)
    vision = config.vision
    if vision.pool != "concat" or vision.pads or vision.order != "rows":
        got = f"vision.pool={vision.pool} vision.pads={str(vision.pads).lower()} vision.order={vision.order}"
        expected = "pixel shuffle, which is all that modeling_nvlm.py has"
        raise problem("pooling", got, expected, "answer with launch/generate.py, which needs no export")
    return encoder.export(config.vision, source.parts["vision"])


def dump(values: Mapping) -> str:
    """The text of a JSON file."""
    return json.dumps(values, indent=2) + "\n"


def describe(config: Config, encoder: ExportedEncoder, text: Text | None = None) -> dict:
    """config.json in the form of NVLM-D-72B, as its own modelling class and vLLM read it.

    The key `nvlm` is ours, for modeling_nvlm.py; other readers ignore it. `text`: from the run's tokenizer; the
    release's `chat()` needs its begin and end tokens. No rotary scaling is written if the run had none: the release's
    `dynamic` scaling changes no logits, but makes vLLM offer three times the trained context length.
    """
    kind = description(config.arch.name)
    name = kind.title.replace("-", "_")
    return {
        "architectures": [name],
        "model_type": name,
        **({"auto_map": dict(kind.release_code)} if kind.release_code else {}),
        "downsample_ratio": 1 / config.vision.downsample,
        "dynamic_image_size": config.tiling.max_tiles > 1,
        "force_image_size": config.vision.tile_size,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": config.tiling.max_tiles,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": config.llm.chat,
        "use_thumbnail": True,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "torch_dtype": _dtype(config),
        "transformers_version": None,
        "llm_config": language(config) | _marks(text),
        "vision_config": {**encoder.config, "torch_dtype": _dtype(config)},
        "nvlm": _own(config),
    }


def _dtype(config: Config) -> str:
    return {"bf16": "bfloat16", "fp32": "float32"}[config.precision.dtype]


def language(config: Config) -> dict:
    llm = config.llm
    interpolated = {"type": "linear", "factor": llm.rope_interpolation} if llm.rope_interpolation > 1 else None
    scaling = {"rope_type": "llama3", **llm.rope_scaling} if llm.rope_scaling else interpolated
    family = "Qwen3" if llm.qk_norm else "Qwen2" if llm.qkv_bias else "Llama"  # Mistral computes as Llama does
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": "llama",  # as in the release, whose class uses `architectures` instead
        "hidden_size": llm.hidden,
        "intermediate_size": llm.ffn,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.kv_heads,
        "head_dim": llm.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": llm.norm_eps,
        "rope_theta": llm.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": llm.max_positions,
        "vocab_size": llm.vocab,
        "attention_bias": llm.qkv_bias,
        "mlp_bias": False,
        "tie_word_embeddings": llm.tied,
        "torch_dtype": _dtype(config),
    }


def _marks(text: Text | None) -> dict:
    return {"bos_token_id": text.begin, "eos_token_id": text.end} if text else {}


def _own(config: Config) -> dict:
    return {
        "arch": config.arch.name,
        "cross_attention_every": config.arch.cross_every,
        "bind_tags": config.arch.bind_tags,
        "sees": config.arch.sees,
        "tag": config.tiling.tag,
        "thumbnail_tag": config.llm.thumbnail_tag,
        "system": config.data.system,
        "bos": config.llm.bos,
        "tokenize": config.data.tokenize,
        "chat": own_format(config.llm.chat),
        "rope_scaling": dict(config.llm.rope_scaling) if config.llm.rope_scaling else None,
    }


def preprocessor(config: Config) -> dict:
    """preprocessor_config.json, for one tile."""
    encoder = description_of(config.vision)
    return {
        "crop_size": config.vision.tile_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
        "resample": 3,
        "size": config.vision.tile_size,
    }
