"""The sources of a configuration's weights, checked against its shapes and values before any weights are read.

Imports no torch: the launcher refuses a wrong folder before it starts workers or writes files.
"""

from __future__ import annotations

from collections.abc import Iterable

from nvlm.arch.registry import description
from nvlm.config.values import Config, LLMConfig, cross_layers, problem
from nvlm.inputs.whole import check_described
from nvlm.runs.earlier import value_now
from nvlm.vision.source import encoder_parts
from nvlm.weights import llm, projector
from nvlm.weights.described import check_language
from nvlm.weights.layouts import NVLM, Layout, encoder_prefix, opened
from nvlm.weights.parts import Part, below
from nvlm.weights.published import Source, check_tensors, check_values, read_config, read_headers


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
    layout, stored = opened(folder, "init.release")
    values = check_described(layout, folder, config, "init.release")
    own, kind = values.get("nvlm") or {}, description(config.arch.name)
    if own.get("arch") == config.arch.name and kind.tags_in_keys:  # not visible in tensor names or shapes
        own = own | {"bind_tags": value_now("arch", "bind_tags", own.get("bind_tags"))}
        check_values(own, {"bind_tags": ("arch.bind_tags", config.arch.bind_tags)}, "init.release", own)
    prefix = encoder_prefix(stored)
    encoder = encoder_parts(config.vision, stored, prefix)
    groups = {
        "vision": encoder.parts,
        "projector": projector_parts(config, layout),
        "xattn": [*_key_norms(config), *below(layout.language, _only_cross(config))],
        "llm": below(layout.language, llm.parts(config.llm)),
    }
    given = {name: parts for name, parts in groups.items() if any(part.name in stored for part in parts)}
    check_new(config, given, f"init.release={folder}")
    spare = [*encoder.spare, *(layout.language + name for name in _spare(config.llm, stored, layout.language))]
    check_tensors([part for parts in given.values() for part in parts], stored, "init.release", spare)
    return Source("init.release", folder, given, stored, prefix)


def whole_model(config: Config, encoder: Iterable[Part], layout: Layout = NVLM) -> list[Part]:
    """Every tensor of a model in `layout`, with names of our own for NVLM-X's and -H's layers.

    `encoder`: its parts, as in `ExportedEncoder`.
    """
    return [part for parts in whole_groups(config, encoder, layout).values() for part in parts]


def whole_groups(config: Config, encoder: Iterable[Part], layout: Layout) -> dict[str, list[Part]]:
    """`whole_model` by the folder that each tensor is in."""
    language = below(layout.language, llm.parts(config.llm, cross_layers(config)))
    groups = {
        "vision": below(layout.vision[0], encoder),
        "projector": projector_parts(config, layout),
        "llm": [*_key_norms(config), *language],
    }
    return groups


def projector_parts(config: Config, layout: Layout = NVLM) -> list[Part]:
    """The projector's tensors as they are published."""
    kind = description(config.arch.name)
    modules = kind.projector_modules(config.projector, config.llm, config.vision, config.row_ends)
    return projector.parts(modules, layout)


def _key_norms(config: Config) -> list[Part]:
    return projector.key_norms(description(config.arch.name).key_norms(config.llm))


def _only_cross(config: Config) -> list[Part]:
    both, plain = llm.parts(config.llm, cross_layers(config)), {part.name for part in llm.parts(config.llm)}
    return [part for part in both if part.name not in plain]


def _spare(language: LLMConfig, stored: Iterable[str], prefix: str = "") -> list[str]:
    """Names of tensors that are allowed but not used: a tied output layer, and buffers in older files."""
    names = [name.removeprefix(prefix) for name in stored]
    tied = [llm.HEAD] if language.tied else []
    return tied + [name for name in names if name.endswith(".rotary_emb.inv_freq")]
