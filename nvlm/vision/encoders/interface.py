"""What the package asks of a vision encoder. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm.config.modules import EncoderModules
from nvlm.config.values import Config, VisionConfig
from nvlm.weights.parts import Part
from nvlm.weights.published import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedEncoder:
    """An encoder as a folder in NVLM-D-72B's layout holds it."""

    parts: Sequence[Part]  # its tensors, named as below the folder's "vision_model."
    config: Mapping[str, object]  # `vision_config` in config.json
    limits: Sequence[str]  # why vLLM and NVLM-D-72B's own class cannot serve such a folder


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDescription:
    """One family of encoders. `fixed`: settings of VisionConfig that have one value in this family.

    `build`: (config, a Megatron ProcessGroupCollection of groups of one) to the Megatron module that maps normalised
    pixels [T, 3, px, px] to the features [T, P, D] of the P patches of each tile. It imports model.py, and so torch.
    """

    name: str  # vision.encoder
    code: Sequence[str]  # published classes that its config.json may name; they are never run
    mean: tuple[float, float, float]  # of the RGB pixels, which are 0 to 1
    std: tuple[float, float, float]
    unseen: Sequence[str]  # settings of VisionConfig that no tensor's name or shape shows
    fixed: Mapping[str, object]
    shipped: Mapping[str, Path]  # weights that come with the package, by their names for init.vision
    unused: Sequence[str]  # how names of published tensors begin that the features do not need, as of a pooling head
    modules: Callable[[VisionConfig], EncoderModules]  # what `build` builds, for nvlm.estimate
    parts: Callable[[VisionConfig, Mapping[str, Stored]], list[Part]]  # the published tensors that `Stored` ones are of
    check_config: Callable[[Mapping, VisionConfig, str], None]  # (config.json, ours, setting that named the folder)
    build: Callable[[Config, Any], Any]
    export: Callable[[VisionConfig, Sequence[Part]], ExportedEncoder] | None  # of the parts as read; None: no class yet
