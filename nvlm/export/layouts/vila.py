"""Exports in VILA-1.5's layout: one folder each for the language model, the encoder and the projector."""

from __future__ import annotations

from nvlm.config.values import Config, problem
from nvlm.export.describe import dump
from nvlm.export.layouts import chat
from nvlm.export.layouts.form import Files, Form, Written
from nvlm.export.layouts.limits import GENERATE, check_decoder, one_tile
from nvlm.export.layouts.llava_hf import text_config
from nvlm.export.layouts.tower import hub_encoder, whole_encoder
from nvlm.inputs.whole import projector_type
from nvlm.vision.encoders.registry import description_of
from nvlm.weights.layouts import VILA

_JOINED = {"linear": 1, "mlp2x_gelu": 1, "mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}


def check(config: Config) -> None:
    """Raise ConfigError if VILA does not compute what the run's model does."""
    check_decoder(config)
    hub_encoder(config)
    kind, vision = projector_type(config), config.vision
    if kind not in _JOINED:
        raise problem("projector", kind or config.projector.name, f"one of {', '.join(_JOINED)}", GENERATE)
    if (vision.downsample, vision.pool) != (_JOINED[kind], "concat") or (vision.downsample > 1 and not vision.pads):
        got = f"vision.downsample={vision.downsample} vision.pool={vision.pool} vision.pads={str(vision.pads).lower()}"
        joined = f"{_JOINED[kind]} x {_JOINED[kind]} patches side by side, with padding, as in VILA's {kind}"
        raise problem("pooling", got, joined, GENERATE)
    if not one_tile(config):
        raise problem("tiling", config.tiling.kind, "one tile per image (VILA-1.5)", GENERATE)


def files(written: Written) -> Files:
    """All files but the tensors; a configuration in each folder, and one that contains them."""
    config, hub, text = written.config, hub_encoder(written.config), text_config(written)
    tower = {**hub.config(config.vision, written.layers), "architectures": [hub.architecture]}
    projector = {
        "architectures": ["MultimodalProjector"],
        "model_type": "v2l_projector",
        "mm_projector_type": projector_type(config),
    }
    folders = VILA.folders
    return {
        **{f"{folders['llm']}/{name}": content for name, content in written.text.files.items()},
        f"{folders['llm']}/config.json": dump(text),
        f"{folders['vision']}/config.json": dump(tower),
        f"{folders['vision']}/preprocessor_config.json": dump(_pictures(config)),
        f"{folders['projector']}/config.json": dump(projector),
        "config.json": dump(_whole(written, text, tower, projector)),
    }


def _whole(written: Written, text: dict, tower: dict, projector: dict) -> dict:
    config, hub = written.config, hub_encoder(written.config)
    return {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "llm_cfg": text,
        "vision_tower_cfg": tower,
        "mm_projector_cfg": projector,
        "hidden_size": config.llm.hidden,
        "mm_hidden_size": config.vision.hidden,
        "mm_vision_select_layer": config.vision.layers - written.layers - 1,
        "mm_vision_select_feature": "patch" if hub.strategy == "default" else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if config.tiling.base == "pad" else "resize",
    }


def _pictures(config: Config) -> dict:
    encoder, px = description_of(config.vision), config.vision.tile_size
    return {
        "image_processor_type": hub_encoder(config).image_processor,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": px, "width": px},
    }


FORM = Form(
    layout=VILA,
    check=check,
    encoder=whole_encoder,
    text=chat.chat_text,
    rows=lambda config, text: config.llm.vocab,
    files=files,
    note=lambda written: None,
)
