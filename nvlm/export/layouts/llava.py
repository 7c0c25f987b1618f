"""Exports in LLaVA's own layout (LlavaLlamaForCausalLM, LlavaQwenForCausalLM), which its code and SGLang load."""

from __future__ import annotations

from nvlm.config.tiles import grid_of
from nvlm.config.values import Config, problem
from nvlm.export.describe import dump
from nvlm.export.layouts import chat
from nvlm.export.layouts.form import Files, Form, Written
from nvlm.export.layouts.limits import GENERATE, check_decoder, one_tile
from nvlm.export.layouts.llava_hf import text_config
from nvlm.export.layouts.tower import hub_encoder, llava_encoder
from nvlm.inputs.whole import projector_type
from nvlm.weights.layouts import LLAVA

_CLASSES = {"qwen2": ("LlavaQwenForCausalLM", "llava_qwen"), "llama": ("LlavaLlamaForCausalLM", "llava_llama")}


def check(config: Config) -> None:
    """Raise ConfigError if no class of LLaVA computes what the run's model does."""
    check_decoder(config)
    hub, vision, tiling = hub_encoder(config), config.vision, config.tiling
    if (found := projector_type(config)) not in ("linear", "mlp2x_gelu"):
        expected = "linear or mlp2x_gelu: LLaVA has no other"
        raise problem("projector", found or config.projector.name, expected, GENERATE)
    if vision.name not in hub.published:
        raise problem("vision", vision.name, f"{', '.join(hub.published)}: LLaVA names its encoder", "layout=llava-hf")
    if vision.downsample != 1:
        raise problem("vision.downsample", vision.downsample, "1: LLaVA pools no pictures", GENERATE)
    if not one_tile(config) and tiling.kind != "anyres":
        raise problem("tiling.kind", tiling.kind, "anyres, or one tile, which are all that LLaVA has", GENERATE)


def describe(written: Written) -> dict:
    """config.json: the language model's, with what it needs to know of the rest."""
    config, text = written.config, text_config(written)
    hub, px, tiling = hub_encoder(config), config.vision.tile_size, config.tiling
    name, kind = _CLASSES[text["model_type"]]
    grids = [[columns * px, rows * px] for columns, rows in map(grid_of, tiling.pinpoints)]
    return {
        **text,
        "architectures": [name],
        "model_type": kind,
        "use_mm_proj": True,
        "mm_vision_tower": hub.published[config.vision.name],
        "mm_hidden_size": config.vision.hidden,
        "mm_projector_type": projector_type(config),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "spatial_unpad" if tiling.newline else "flat",
        "image_aspect_ratio": _aspect(config),
        **({"image_grid_pinpoints": grids} if grids else {}),
        "unfreeze_mm_vision_tower": True,  # so that LLaVA reads the encoder from this folder
        "tokenizer_model_max_length": config.llm.positions,
    }


def _aspect(config: Config) -> str:
    tiling = config.tiling
    if tiling.pinpoints:
        return "anyres" if tiling.cap is None else f"anyres_max_{tiling.cap:g}"
    return "pad" if tiling.base == "pad" else "square"


def files(written: Written) -> Files:
    """All files but the tensors."""
    return {**written.text.files, "config.json": dump(describe(written))}


FORM = Form(
    layout=LLAVA,
    check=check,
    encoder=llava_encoder,
    text=chat.chat_text,
    rows=lambda config, text: config.llm.vocab,
    files=files,
    note=lambda written: None,
)
