"""The sources of a configuration's weights, checked against its shapes and values before any weights are read.

Imports no torch: the launcher refuses a wrong folder before it starts workers or writes files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nvlm.arch.registry import description
from nvlm.config.values import Config, LLMConfig, cross_layers, problem
from nvlm.vision.encoders.registry import description_of
from nvlm.weights import defaults, llm, projector
from nvlm.weights.defaults import completed
from nvlm.weights.described import check_language
from nvlm.weights.parts import Part, below
from nvlm.weights.published import (
    LANGUAGE,
    RELEASE_CODE,
    VISION,
    Source,
    Stored,
    check_fixed,
    check_tensors,
    check_values,
    read_config,
    read_headers,
)


def model_source(config: Config) -> Source | None:
    """The published folder of the language model, checked. Raises ConfigError if it does not fit `config`."""
    if config.init.llm:
        return _llm(config, config.init.llm)
    return _release(config, config.init.release) if config.init.release else None


def check_new(config: Config, given: Iterable[str], where: str) -> None:
    """Raise ConfigError if a module group is neither `given` nor declared new by the stage."""
    needed = description(config.arch.name).groups
    if lost := [group for group in needed if group not in {*given, *config.stage.new}]:
        fix = f"init.checkpoint=RUN of the stage before, or stage.new=[{','.join([*config.stage.new, lost[0]])}]"
        raise problem(f"weights of {', '.join(lost)}", f"none in {where}", "weights of all that is not new", fix)


def _llm(config: Config, folder: str) -> Source:
    stored = read_headers(folder, "init.llm")
    if values := read_config(folder, "init.llm"):
        check_language(values, config.llm, "init.llm")
    parts = llm.parts(config.llm)
    check_tensors(parts, stored, "init.llm", _spare(config.llm, stored))
    check_new(config, ("llm",), f"init.llm={folder}")
    return Source("init.llm", folder, {"llm": parts}, stored)


def _release(config: Config, folder: str) -> Source:
    stored = read_headers(folder, "init.release")
    values = read_config(folder, "init.release", RELEASE_CODE) or {}
    if values:
        check_whole(values, config, "init.release")
    own, kind = values.get("nvlm") or {}, description(config.arch.name)
    if own.get("arch") == config.arch.name and kind.keys:  # not visible in tensor names or shapes
        names = ["sees", *(["bind_tags"] if kind.tags_in_keys else [])]
        expected = {name: (f"arch.{name}", getattr(config.arch, name)) for name in names}
        check_values({"sees": "before"} | own, expected, "init.release", own)
    encoder = {name.removeprefix(VISION): one for name, one in stored.items() if name.startswith(VISION)}
    groups = {
        "vision": below(VISION, description_of(config.vision).parts(config.vision, encoder)),
        "projector": projector_parts(config),
        "xattn": [*_key_norms(config), *below(LANGUAGE, _only_cross(config))],
        "llm": below(LANGUAGE, llm.parts(config.llm)),
    }
    given = {name: parts for name, parts in groups.items() if any(part.name in stored for part in parts)}
    check_new(config, given, f"init.release={folder}")
    spare = [LANGUAGE + name for name in _spare(config.llm, stored)]
    check_tensors([part for parts in given.values() for part in parts], stored, "init.release", spare)
    return Source("init.release", folder, given, stored)


def check_whole(values: Mapping, config: Config, key: str) -> None:
    """Compare all three parts of a model's config.json, in the release's layout, with `config`."""
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


def whole_model(config: Config, encoder: Iterable[Part]) -> list[Part]:
    """Every tensor of a model in NVLM-D-72B's layout, extended for NVLM-X and -H.

    `encoder`: its parts, as in `ExportedEncoder`.
    """
    return [
        *below(VISION, encoder),
        *projector_parts(config),
        *_key_norms(config),
        *below(LANGUAGE, llm.parts(config.llm, cross_layers(config))),
    ]


def projector_parts(config: Config) -> list[Part]:
    """The projector's tensors as they are published."""
    kind = description(config.arch.name)
    return projector.parts(kind.projector_modules(config.projector, config.llm, config.vision, config.row_ends))


def _key_norms(config: Config) -> list[Part]:
    return projector.key_norms(description(config.arch.name).key_norms(config.llm))


def _only_cross(config: Config) -> list[Part]:
    both, plain = llm.parts(config.llm, cross_layers(config)), {part.name for part in llm.parts(config.llm)}
    return [part for part in both if part.name not in plain]


def _spare(language: LLMConfig, stored: Mapping[str, Stored]) -> list[str]:
    """Names of tensors that are allowed but not used: a tied output layer, and buffers in older files."""
    names = [name.removeprefix(LANGUAGE) for name in stored]
    tied = [llm.HEAD] if language.tied else []
    return tied + [name for name in names if name.endswith(".rotary_emb.inv_freq")]
