"""Where a configuration's weights come from, checked against its shapes and values before anything is read.

Imports no torch: the launcher refuses a wrong folder before it starts a worker or writes a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvlm.config.values import Config, LLMConfig, VisionConfig, cross_layers, problem
from nvlm.weights import internvit, llm, projector
from nvlm.weights.described import check_language, check_vision, check_whole
from nvlm.weights.parts import Part, below
from nvlm.weights.published import Stored, check_tensors, check_values, read_config, read_headers

TINY = Path(__file__).parent.parent / "vision" / "tiny_encoder.safetensors"
VISION, LANGUAGE = "vision_model.", "language_model."
RELEASE_CODE = ("configuration_nvlm_d.NVLM_D_Config", "modeling_nvlm_d.NVLM_D_Model")
_VISION_CODE = ("configuration_intern_vit.InternVisionConfig", "modeling_intern_vit.InternVisionModel")


@dataclass(frozen=True, slots=True)
class Source:
    """A published folder, and what of the model it holds."""

    key: str  # the setting that names it
    folder: str
    parts: Mapping[str, Sequence[Part]]  # by module group
    stored: Mapping[str, Stored]


def model_source(config: Config) -> Source | None:
    """The published folder that holds the language model, checked; ConfigError where it is not what it should be."""
    if config.init.llm:
        return _llm(config, config.init.llm)
    return _release(config, config.init.release) if config.init.release else None


def vision_source(config: Config) -> Source:
    """The published folder that holds the frozen encoder, checked as in `model_source`."""
    for key in ("vision", "release"):
        if folder := getattr(config.init, key):
            return _vision(config.vision, str(TINY) if folder == "tiny" else folder, f"init.{key}")
    raise problem("init.vision", "nothing", "the frozen encoder's weights", "init.vision=DIR, or vision=tiny")


def check_new(config: Config, given: Iterable[str], where: str) -> None:
    """Raise ConfigError where a module group is neither `given` nor one that the stage declares new."""
    needed = {"decoder": ("llm", "projector")}.get(config.arch.name, ("llm", "projector", "xattn"))
    if lost := [group for group in needed if group not in {*given, *config.stage.new}]:
        fix = f"init.checkpoint=RUN of the stage before, or stage.new=[{','.join([*config.stage.new, lost[0]])}]"
        raise problem(f"weights of {', '.join(lost)}", f"none in {where}", "weights of all that is not new", fix)


def _vision(vision: VisionConfig, folder: str, key: str) -> Source:
    stored = read_headers(folder, key)
    values = read_config(folder, key, (*_VISION_CODE, *RELEASE_CODE)) or {}
    inside = any(name.startswith(VISION) for name in stored)  # a whole model's folder
    if inside:
        stored = {name: one for name, one in stored.items() if name.startswith(VISION)}
    prefix = VISION if inside else ""
    parts = below(prefix, internvit.parts(vision, _dummy_heads(vision, stored, prefix)))
    if values:
        check_vision(values.get("vision_config") or values, vision, key)
    check_tensors(parts, stored, key)
    return Source(key, folder, {"vision": parts}, stored)


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
    own = values.get("nvlm") or {}
    if own.get("arch") == config.arch.name == "hybrid":  # what no tensor's name or shape shows
        check_values(own, {"bind_tags": ("arch.bind_tags", config.arch.bind_tags)}, "init.release", own)
    groups = {
        "vision": below(VISION, internvit.parts(config.vision, _dummy_heads(config.vision, stored, VISION))),
        "projector": projector.parts(config),
        "xattn": [*projector.key_norms(config), *below(LANGUAGE, _only_cross(config))],
        "llm": below(LANGUAGE, llm.parts(config.llm)),
    }
    given = {name: parts for name, parts in groups.items() if any(part.name in stored for part in parts)}
    check_new(config, given, f"init.release={folder}")
    spare = [LANGUAGE + name for name in _spare(config.llm, stored)]
    check_tensors([part for parts in given.values() for part in parts], stored, "init.release", spare)
    return Source("init.release", folder, given, stored)


def whole_model(config: Config, dummy_heads: int) -> list[Part]:
    """Every tensor of a model in NVLM-D-72B's layout, and for NVLM-X and -H in ours behind it."""
    return [
        *below(VISION, internvit.parts(config.vision, dummy_heads)),
        *projector.parts(config),
        *projector.key_norms(config),
        *below(LANGUAGE, llm.parts(config.llm, cross_layers(config))),
    ]


def _only_cross(config: Config) -> list[Part]:
    both, plain = llm.parts(config.llm, cross_layers(config)), {part.name for part in llm.parts(config.llm)}
    return [part for part in both if part.name not in plain]


def _spare(language: LLMConfig, stored: Mapping[str, Stored]) -> list[str]:
    """Names that may be there for nothing: a tied output layer, and buffers that older files hold."""
    names = [name.removeprefix(LANGUAGE) for name in stored]
    tied = [llm.HEAD] if language.tied else []
    return tied + [name for name in names if name.endswith(".rotary_emb.inv_freq")]


def _dummy_heads(vision: VisionConfig, stored: Mapping[str, Stored], prefix: str) -> int:
    first = stored.get(f"{prefix}encoder.layers.0.attn.qkv.weight")
    rows = first.shape[0] if first else 0
    extra, rest = divmod(rows - 3 * vision.hidden, 3 * vision.hidden // vision.heads)
    return extra if extra > 0 and not rest else 0
