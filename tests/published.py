"""Folders in published formats with small random weights, written by transformers or in the form of the releases."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from nvlm.config.values import Config
from nvlm.inputs.sources import whole_model
from nvlm.vision.encoders.internvit import description as internvit
from nvlm.weights.parts import shapes

SMALL = """precision=fp32 arch=decoder llm.layers=4 llm.hidden=24 llm.heads=4 llm.kv_heads=2 llm.head_dim=6 llm.ffn=40
llm.vocab=522 llm.vocab_multiple=8 llm.rope_theta=5000 llm.norm_eps=1e-5
vision.hidden=30 vision.layers=2 vision.heads=5 vision.ffn=44 vision.patch=14 vision.tile_size=56""".split()
LLAMA3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64.0)
LANGUAGES = {
    "qwen2": (),
    "qwen2-tied": ("llm.tied=true",),
    "yi": ("llm.qkv_bias=false",),
    "qwen3": ("llm.qkv_bias=false", "llm.qk_norm=true"),
    "mistral": ("llm.qkv_bias=false",),
    "vicuna, interpolated": ("llm.qkv_bias=false", "llm.rope_interpolation=2"),
    "llama-3.1": (
        "llm.qkv_bias=false",
        "llm.rope_scaling={" + ",".join(f"{key}:{value}" for key, value in LLAMA3.items()) + "}",
    ),
}


def language_model(config: Config, seed: int = 3, family: str | None = None) -> transformers.PreTrainedModel:
    """transformers' own class with random weights large enough to matter, including biases and norms.

    `family`: of the class, where `config` fits several.
    """
    llm = config.llm
    family = family or ("Qwen3" if llm.qk_norm else "Qwen2" if llm.qkv_bias else "Llama")
    common = dict(
        hidden_size=llm.hidden,
        num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads,
        head_dim=llm.head_dim,
        intermediate_size=llm.ffn,
        vocab_size=llm.vocab,
        rms_norm_eps=llm.norm_eps,
        tie_word_embeddings=llm.tied,
        max_position_embeddings=512,
        attn_implementation="eager",
    )
    linear = {"rope_type": "linear", "factor": llm.rope_interpolation}
    scaling = {"rope_type": "llama3", **llm.rope_scaling} if llm.rope_scaling else linear
    if llm.rope_scaling is None and llm.rope_interpolation == 1:
        scaling = {"rope_type": "default"}
    if family == "Mistral":
        common["sliding_window"] = None
    common["rope_parameters"] = {"rope_theta": llm.rope_theta, **scaling}
    described = getattr(transformers, f"{family}Config")(**common)
    return scatter(getattr(transformers, f"{family}ForCausalLM")(described), seed)


def encoder_model(config: Config, seed: int = 4) -> torch.nn.Module:
    """transformers' own class for InternViT."""
    vision = config.vision
    described = transformers.InternVLVisionConfig(
        hidden_size=vision.hidden,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        intermediate_size=vision.ffn,
        image_size=vision.tile_size,
        patch_size=vision.patch,
        norm_type={"rms": "rms_norm", "layer": "layer_norm"}[vision.norm],
        layer_norm_eps=vision.norm_eps,
        attention_bias=vision.qkv_bias,
        use_qk_norm=vision.qk_norm,
        use_mean_pooling=True,
        attn_implementation="eager",
    )
    return scatter(transformers.InternVLVisionModel(described), seed)


def scatter(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights everywhere, with norms around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(noise + (1 if parameter.ndim == 1 and "norm" in name and "bias" not in name else 0))
    return model.eval()


def internvit_names(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """transformers' tensors under the names and in the form of OpenGVLab's InternViT files."""
    renamed = {
        "embeddings.class_embedding": state["embeddings.cls_token"],
        "embeddings.position_embedding": state["embeddings.position_embeddings"],
        "embeddings.patch_embedding.weight": state["embeddings.patch_embeddings.projection.weight"],
        "embeddings.patch_embedding.bias": state["embeddings.patch_embeddings.projection.bias"],
    }
    plain = {
        "attention.projection_layer": "attn.proj",
        "attention.q_norm": "attn.q_norm",
        "attention.k_norm": "attn.k_norm",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for layer in range(layers):
        theirs, ours = f"encoder.layer.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            for before, after in plain.items():
                if f"{theirs}.{before}.{kind}" in state:
                    renamed[f"{ours}.{after}.{kind}"] = state[f"{theirs}.{before}.{kind}"]
            if f"{theirs}.attention.q_proj.{kind}" in state:
                apart = [state[f"{theirs}.attention.{part}_proj.{kind}"] for part in "qkv"]
                renamed[f"{ours}.attn.qkv.{kind}"] = torch.cat(apart)
        renamed |= {f"{ours}.ls{n}": state[f"{theirs}.lambda_{n}"] for n in (1, 2)}
    return {name: tensor.clone() for name, tensor in renamed.items()}


def write_release(
    folder: Path, config: Config, dummy_heads: int, dtype: torch.dtype, seed: int = 5, files: int = 3
) -> dict[str, Tensor]:
    """A folder in NVLM-D-72B's format, with `files` files and an index; returns its tensors."""
    generator = torch.Generator().manual_seed(seed)
    parts = whole_model(config, internvit.parts(config.vision, dummy_heads))
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.15 + (1 if "norm" in name else 0)).to(dtype)
        for name, shape in shapes(parts).items()
    }
    for name, tensor in tensors.items():  # dummy heads are zeros
        covered = [part for part in parts if part.name == name]
        real = torch.zeros_like(tensor)
        for part in covered:
            real[part.extent] = tensor[part.extent]
        tensors[name] = real
    folder.mkdir(parents=True)
    write_shards(folder, tensors, files)
    return tensors


def write_shards(folder: Path, tensors: dict[str, Tensor], files: int) -> None:
    """`tensors` in `files` safetensors files and an index."""
    names, weight_map = list(tensors), {}
    each = -(-len(names) // files)
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        chosen = names[number * each : (number + 1) * each]
        save_file({name: tensors[name] for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
