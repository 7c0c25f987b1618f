"""Small models of transformers' LLaVA classes with random weights, and runs that read their folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.published import scatter

IMAGE_ID, VIDEO_ID, ROWS = 339, 340, 576  # after the tiny tokenizer's 339 words
SIDE, PATCH = 28, 7
TOWER = dict(hidden_size=24, num_attention_heads=3, intermediate_size=36, patch_size=PATCH, image_size=SIDE)
WORDS = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=ROWS, max_position_embeddings=512, rms_norm_eps=1e-5,
    rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
)  # fmt: skip
# Grids as columns x rows; transformers has [height, width] in px.
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
FORMS = ",".join(f"{columns}x{rows}" for columns, rows in GRIDS)
PINPOINTS = [[rows * SIDE, columns * SIDE] for columns, rows in GRIDS]
SETTINGS = f"""arch=decoder precision=fp32 projector=mlp2x_gelu llm.layers=4 llm.hidden=24 llm.heads=4 llm.kv_heads=2
llm.head_dim=6 llm.ffn=40 llm.vocab={ROWS} llm.vocab_multiple=1 llm.rope_theta=5000 llm.norm_eps=1e-5
llm.max_positions=512 vision.hidden=24 vision.layers=2 vision.heads=3 vision.ffn=36 vision.patch={PATCH}
vision.tile_size={SIDE} init.vision=null tiling.unpad=digits data.image_marks=false""".split()
OWN = {
    "next": ("vision=clip-l-336", "tiling=anyres", "llm.qkv_bias=false"),
    "onevision": (
        "vision=siglip-so400m",
        "tiling=anyres_max_9",
        "tiling.cap=2",
        "llm.qkv_bias=true",
        f"tiling.pinpoints=[{FORMS}]",
    ),
}


def model_of(kind: str, seed: int = 6, tied: bool = False) -> transformers.PreTrainedModel:
    """transformers' class for `kind`, next or onevision. `tied`: the output layer is the word embedding."""
    common = dict(
        image_token_id=IMAGE_ID, video_token_id=VIDEO_ID, image_grid_pinpoints=PINPOINTS, tie_word_embeddings=tied
    )
    if kind == "next":
        tower = transformers.CLIPVisionConfig(**TOWER, num_hidden_layers=3)
        config = transformers.LlavaNextConfig(
            vision_config=tower, text_config=transformers.LlamaConfig(**WORDS, head_dim=6), **common
        )
        model = transformers.LlavaNextForConditionalGeneration(config)
    else:
        tower = transformers.SiglipVisionConfig(**TOWER, num_hidden_layers=2, vision_use_head=False)
        words = transformers.Qwen2Config(**WORDS, tie_word_embeddings=tied)
        config = transformers.LlavaOnevisionConfig(
            vision_config=tower, text_config=words, vision_aspect_ratio="anyres_max_2", **common
        )
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
    return scatter(model, seed)


def write(folder: Path, kind: str, hub: bool = False, tied: bool = False) -> transformers.PreTrainedModel:
    """A folder as transformers writes it or, with `hub`, with the names that its tensors had in 2024."""
    model = model_of(kind, tied=tied)
    model.save_pretrained(folder)
    if hub:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        renamed = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): t for name, t in tensors.items()}
        save_file(renamed, file, {"format": "pt"})
    return model


def logits_of(model: transformers.PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [S, V] of one row."""
    with torch.no_grad():
        return model(**inputs).logits[0].log_softmax(-1)


LLAVA_NAMES = {  # the original's, by transformers 5's
    "language_model.": "",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "image_newline": "model.image_newline",
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
}
VILA_NAMES = {
    "language_model.": "llm/",
    "multi_modal_projector.linear_1.": "mm_projector/layers.0.",
    "multi_modal_projector.linear_2.": "mm_projector/layers.2.",
    "vision_tower.": "vision_tower/vision_model.",
}


def renamed(tensors: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """`tensors` with the prefixes `names`; those without one are left out."""
    return {
        after + name.removeprefix(before): tensor
        for name, tensor in tensors.items()
        for before, after in names.items()
        if name.startswith(before)
    }


def write_llava(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """A folder in the original's layout with its config.json; returns its tensors."""
    write(folder, kind)
    tensors = renamed(load_file(folder / "model.safetensors"), LLAVA_NAMES)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())["text_config"]
    own = {
        "architectures": ["LlavaLlamaForCausalLM" if kind == "next" else "LlavaQwenForCausalLM"],
        "model_type": "llava",
        "mm_hidden_size": 24,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }
    (folder / "config.json").write_text(json.dumps(values | own))
    return tensors


def write_vila(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """VILA's three folders; returns their tensors by path."""
    write(folder / "whole", kind)
    values = json.loads((folder / "whole" / "config.json").read_text())
    tensors = renamed(load_file(folder / "whole" / "model.safetensors"), VILA_NAMES)
    configs = {
        "llm": values["text_config"]
        | {"architectures": ["LlamaForCausalLM" if kind == "next" else "Qwen2ForCausalLM"]},
        "vision_tower": values["vision_config"],
        "mm_projector": {"mm_projector_type": "mlp2x_gelu", "model_type": "v2l_projector"},
    }
    for name, config in configs.items():
        (folder / name).mkdir()
        own = {path.partition("/")[2]: t for path, t in tensors.items() if path.startswith(f"{name}/")}
        save_file(own, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))
    own = {"mm_vision_select_layer": values["vision_feature_layer"]}
    own["mm_vision_select_feature"] = "patch" if kind == "next" else "cls_patch"
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlavaLlamaModel"], **own}))
    return tensors
