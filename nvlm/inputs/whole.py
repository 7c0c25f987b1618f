"""What the config.json of a whole published model says, compared with the run's configuration, in each layout.

What no tensor shows (which of the encoder's layers is read, whether its class token is dropped) would change every
number without a word. Raises ConfigError. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from nvlm.arch.registry import description
from nvlm.config.values import Config, problem
from nvlm.vision.encoders.registry import description_of
from nvlm.weights import defaults
from nvlm.weights.defaults import completed
from nvlm.weights.described import check_language
from nvlm.weights.layouts import LLAVA, LLAVA_HF, NVLM, VILA, Layout
from nvlm.weights.published import RELEASE_CODE, check_fixed, check_values, read_config


def check_described(layout: Layout, folder: str, config: Config, key: str) -> Mapping:
    """The folder's config.json, compared with `config`; empty without one."""
    values = read_config(folder, key, RELEASE_CODE) or {}
    if values or layout is VILA:
        _CHECKS[layout.name](values, folder, config, key)
    return values


def check_whole(values: Mapping, config: Config, key: str) -> None:
    """Compare all three parts of a config.json in NVLM-D-72B's layout."""
    check_language(values.get("llm_config") or {}, config.llm, key)
    description_of(config.vision).check_config(values.get("vision_config") or {}, config.vision, key)
    whole = completed(values, defaults.INTERNVL)
    check_fixed(whole, defaults.FIXED_WHOLE, key)
    whole["downsample_ratio"] = round(1 / whole["downsample_ratio"])
    whole.setdefault("force_image_size", config.vision.tile_size)  # already compared with the encoder's
    expected = {
        "downsample_ratio": ("vision.downsample", config.vision.downsample),
        "force_image_size": ("vision.tile_size", config.vision.tile_size),
    }
    check_values(whole, expected, key, values)


def projector_type(config: Config) -> str | None:
    """The name of the run's projector in LLaVA and VILA; None if they have none like it."""
    projector = config.projector
    kind = description(config.arch.name).projector_kind(projector)
    if not projector.bias or (kind == "mlp" and projector.inner != "hidden"):
        return None
    if not projector.norm:
        return {"affine": "linear", "mlp": "mlp2x_gelu"}.get(kind)
    joined = "mlp_downsample" if config.vision.order == "columns" else "mlp_downsample_2x2_fix"
    return {"mlp": joined, "deep": "mlp_downsample_3x3_fix"}.get(kind)


_TYPED = {  # what to type for VILA's projectors
    "mlp_downsample": "projector=mlp_downsample pooling=concat_2x2_columns",
    "mlp_downsample_2x2_fix": "projector=mlp_downsample pooling=concat_2x2",
    "mlp_downsample_3x3_fix": "projector=mlp_downsample_3x3 pooling=concat_3x3",
}


def _check_projector(values: Mapping, config: Config, key: str) -> None:
    """Compare `mm_projector_type`."""
    kind = values.get("mm_projector_type")
    if kind is not None and kind != (ours := projector_type(config)):
        expected = f"{ours or config.projector.name}, as in this run"
        fix = _TYPED.get(kind, f"projector={kind}")
        raise problem(f"{key}: config.json: mm_projector_type", kind, expected, fix)


def _check_llava(values: Mapping, folder: str, config: Config, key: str) -> None:
    named = [defaults.LLAVA[name] for name in values.get("architectures") or [] if name in defaults.LLAVA]
    if not named:
        got = values.get("architectures") or values.get("model_type")
        raise problem(f"{key}: config.json: architectures", got, f"one of {', '.join(defaults.LLAVA)}", "take another")
    check_language({**values, "architectures": named}, config.llm, key)
    check_fixed(values, defaults.FIXED_LLAVA, key)
    _check_projector(values, config, key)
    width = {"mm_hidden_size": config.vision.hidden, **{k: v for k, v in values.items() if v is not None}}
    check_values(width, {"mm_hidden_size": ("vision.hidden", config.vision.hidden)}, key, values)


def _check_llava_hf(values: Mapping, folder: str, config: Config, key: str) -> None:
    kind = next((name for name in values.get("architectures") or [] if name in defaults.LLAVA_HF), None)
    if kind is None:
        got, known = values.get("architectures"), f"one of {', '.join(defaults.LLAVA_HF)}"
        raise problem(f"{key}: config.json: architectures", got, known, "take another")
    tied = values.get("tie_word_embeddings")
    text = {**({} if tied is None else {"tie_word_embeddings": tied}), **(values.get("text_config") or {})}
    check_language(text, config.llm, key)
    check_fixed(values, defaults.FIXED_LLAVA_HF, key)
    whole, vision = completed(values, defaults.LLAVA_HF[kind]), values.get("vision_config") or {}
    _check_features(whole, vision, config, key)


def _check_features(whole: Mapping, vision: Mapping, config: Config, key: str) -> None:
    """Which layer of the encoder is read, and whether its first token is dropped."""
    encoder, layers = description_of(config.vision), vision.get("num_hidden_layers")
    encoder.check_config(vision, config.vision, key)
    _check_layer("vision_feature_layer", whole["vision_feature_layer"], layers, config, key)
    if encoder.hub is not None:
        check_fixed(whole, {"vision_feature_select_strategy": encoder.hub.strategy}, key)


def _check_layer(name: str, layer: object, layers: object, config: Config, key: str) -> None:
    """`layer`: the entry `name` for which of the encoder's `layers` is read; negative ones count from the end."""
    if isinstance(layers, int) and isinstance(layer, int):
        read, given = layers + 1 + layer if layer < 0 else layer, f"{layer} of {layers} layers"
        check_values({name: read}, {name: ("vision.layers", config.vision.layers)}, key, {name: given})


def _check_vila(values: Mapping, folder: str, config: Config, key: str) -> None:
    check_fixed(values, defaults.FIXED_VILA, key)
    parts = {name: read_config(str(Path(folder) / place), key) or {} for name, place in VILA.folders.items()}
    if parts["llm"]:
        check_language(parts["llm"], config.llm, key)
    _check_projector(parts["projector"], config, key)
    layers = parts["vision"].get("num_hidden_layers")
    _check_layer("mm_vision_select_layer", values.get("mm_vision_select_layer", -2), layers, config, key)
    if hub := description_of(config.vision).hub:
        kept = {"default": "patch", "full": "cls_patch"}[hub.strategy]
        check_fixed(values, {"mm_vision_select_feature": kept}, key)


_CHECKS: Mapping[str, Callable[[Mapping, str, Config, str], None]] = {
    NVLM.name: lambda values, folder, config, key: check_whole(values, config, key),
    LLAVA.name: _check_llava,
    LLAVA_HF.name: _check_llava_hf,
    VILA.name: _check_vila,
}
