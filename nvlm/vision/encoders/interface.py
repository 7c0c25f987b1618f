"""The interface of a vision encoder. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nvlm.config.modules import EncoderModules
from nvlm.config.values import Config, VisionConfig
from nvlm.weights.parts import Part
from nvlm.weights.published import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedEncoder:
    """An encoder in the layout of NVLM-D-72B."""

    parts: Sequence[Part]  # its tensors, named without the prefix "vision_model."
    config: Mapping[str, object]  # `vision_config` in config.json
    limits: Sequence[str]  # why vLLM and NVLM-D-72B's own class cannot load such a folder


@dataclass(frozen=True, slots=True, kw_only=True)
class HubEncoder:
    """An encoder as LLaVA's and VILA's models have it, with transformers' class."""

    architecture: str  # that class
    image_processor: str
    config: Callable[[VisionConfig, int], Mapping[str, object]]  # its config.json with this many layers
    strategy: Literal["default", "full"]  # default: its first token is none of the features
    ends_early: bool  # LLaVA leaves layers out that no feature comes from
    published: Mapping[str, str]  # names of published models by those of VisionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDescription:
    """One family of encoders. `fixed`: VisionConfig settings that have only one value in this family.

    `build`: (config, a Megatron ProcessGroupCollection of single-rank groups) -> the Megatron module that maps
    normalised pixels [T, 3, px, px] to features [T, P, D] of the P patches of each tile. It imports model.py, and thus
    torch. `frozen`: (what `build` built, with its weights, which it may use up, the configuration, a number that the
    rows of each linear's input must be a multiple of) -> a module with the same features for inference alone.
    """

    name: str  # vision.encoder
    code: Sequence[str]  # published classes that its config.json may name; they are never executed
    mean: tuple[float, float, float]  # of the RGB pixels, which are 0 to 1
    std: tuple[float, float, float]
    unseen: Sequence[str]  # VisionConfig settings that do not show in tensor names or shapes
    fixed: Mapping[str, object]
    crops: bool  # pixels that fill no patch, on the right and at the bottom, are not seen; else they are refused
    shipped: Mapping[str, Path]  # weights that ship with the package, by their names in init.vision
    unneeded: Callable[[VisionConfig, str], bool]  # whether a published tensor is not needed: a pooling head's
    modules: Callable[[VisionConfig], EncoderModules]  # what `build` builds, for nvlm.estimate
    parts: Callable[[VisionConfig, Mapping[str, Stored]], list[Part]]  # (config, stored tensors) -> published
    check_config: Callable[[Mapping, VisionConfig, str], None]  # (config.json, ours, the setting naming the folder)
    build: Callable[[Config, Any], Any]
    frozen: Callable[[Any, VisionConfig, int], Any]
    export: Callable[[VisionConfig, Sequence[Part]], ExportedEncoder] | None  # None: not in NVLM-D-72B's layout
    hub: HubEncoder | None = None  # None: not in LLaVA's and VILA's layouts
