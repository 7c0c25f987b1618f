"""The encoder of an export in LLaVA's and VILA's layouts: all tensors that its published class has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nvlm.config.values import Config, problem
from nvlm.export.layouts.form import EncoderPart
from nvlm.export.shards import DTYPES
from nvlm.vision.encoders.interface import HubEncoder
from nvlm.vision.encoders.registry import ENCODERS, description_of
from nvlm.weights.parts import Part
from nvlm.weights.published import Source

_LAYER = "encoder.layers."


def hub_encoder(config: Config) -> HubEncoder:
    """How published models describe the run's encoder. Raises ConfigError if none has it."""
    encoder = description_of(config.vision)
    if encoder.hub is None:
        known = ", ".join(name for name, other in ENCODERS.items() if other.hub is not None)
        raise problem(f"vision.encoder={encoder.name}", "an encoder that this layout lacks", known, "layout=nvlm")
    return encoder.hub


def llava_encoder(config: Config, source: Source, spare: Source) -> Sequence[EncoderPart]:
    """The encoder with its final norm, and with later layers if the model's class has them (CLIP's last)."""
    later = not hub_encoder(config).ends_early

    def kept(name: str) -> bool:
        return name.startswith("post_layernorm.") or (later and name.startswith(_LAYER))

    return _with(source, spare, kept)


def whole_encoder(config: Config, source: Source, spare: Source) -> Sequence[EncoderPart]:
    """The encoder with all that its published folder has, a pooling head for example."""
    hub_encoder(config)
    return _with(source, spare, lambda name: True)


def _with(source: Source, spare: Source, kept: Callable[[str], bool]) -> list[EncoderPart]:
    """The tensors that are read, and those of `spare` that are `kept`, under names without their folder's prefix."""
    found = [(part, source) for part in source.parts["vision"]]
    used = {part.name.removeprefix(source.vision) for part, _ in found}
    for name, one in spare.stored.items():
        own = name.removeprefix(spare.vision)
        if own not in used and kept(own) and one.dtype in DTYPES:
            found.append((Part(name=name, shape=one.shape, ours=""), spare))
    return [
        EncoderPart(written=replace(part, name=part.name.removeprefix(place.vision)), read=part, source=place)
        for part, place in found
    ]


def layers_in(parts: Sequence[EncoderPart]) -> int:
    """The number of layers in an encoder's tensors."""
    names = (one.written.name for one in parts)
    return 1 + max(int(name.removeprefix(_LAYER).split(".")[0]) for name in names if name.startswith(_LAYER))
