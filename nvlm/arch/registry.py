"""Architectures by name; model code is imported on demand. An error for an unknown name lists the known ones."""

from __future__ import annotations

from importlib import import_module

from nvlm.arch.description import Description
from nvlm.config.values import Config, pipeline_layers, problem
from nvlm.tiling.placement import TileUse

_ARCHITECTURES = {
    "decoder": "nvlm.arch.decoder",
    "xattn": "nvlm.arch.xattn",
    "hybrid": "nvlm.arch.hybrid",
}


def _package(name: str) -> str:
    if name not in _ARCHITECTURES:
        raise problem("arch.name", repr(name), f"one of {', '.join(_ARCHITECTURES)}", "arch=hybrid")
    return _ARCHITECTURES[name]


def build_architecture(config: Config):
    """The nvlm.arch.base.Architecture that `config.arch` names."""
    return import_module(f"{_package(config.arch.name)}.model").architecture(config.arch)


def description(name: str) -> Description:
    """The description of the architecture `name`."""
    return import_module(f"{_package(name)}.description").DESCRIPTION


def check_architecture(config: Config) -> Config:
    """Return `config`, or raise ConfigError if its architecture is unknown or its settings are not allowed."""
    name, every = config.arch.name, config.arch.cross_every
    kind = description(name)
    if config.data.tokenize != "apart" and not kind.joins_text:
        raise problem("data.tokenize", config.data.tokenize, f"apart for arch={name}", "data.tokenize=apart")
    if every and not kind.keys:
        raise problem("arch.cross_every", every, f"0 for arch={name}", "arch.cross_every=0")
    if kind.keys and not 1 <= every <= config.llm.layers:
        fix = f"arch.cross_every={config.llm.cross_every}"
        raise problem("arch.cross_every", every, f"1 to llm.layers={config.llm.layers}", fix)
    if config.arch.sees == "latest" and not kind.keys:
        expected = f"before for arch={name}, whose self-attention sees all images before a token"
        raise problem("arch.sees", "latest", expected, "arch.sees=before, or arch=xattn")
    if config.arch.bind_tags != "none" and not kind.tags_in_keys:
        expected = f"none for arch={name}, whose tags are no keys"
        raise problem("arch.bind_tags", config.arch.bind_tags, expected, "arch.bind_tags=none, or arch=hybrid")
    return config


def tile_use(config: Config, pipeline_stage: int) -> TileUse:
    """How `pipeline_stage` uses tiles. Stages are counted over all virtual stages."""
    kind, every = description(config.arch.name), config.arch.cross_every
    layers = pipeline_layers(config, pipeline_stage)
    carries = every > 0 and layers.stop // every > layers.start // every  # every k-th layer, counted from 1
    return TileUse(stream=pipeline_stage == 0 and kind.tiles_in_stream, keys=kind.tiles_in_keys and carries)


def placement_rule(name: str):
    """The architecture's rule for placing an image's tiles and tags, without importing any model code."""
    return import_module(f"{_package(name)}.placement").placement
