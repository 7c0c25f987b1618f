"""The encoder of an export in LLaVA's and VILA's layouts: all tensors that its published class has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nvlm.config.values import Config, problem
from nvlm.export.layouts.form import EncoderPart
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


def llava_encoder(config: Config, source: Source) -> Sequence[EncoderPart]:
    """The encoder with its final norm, and with later layers if the model's class has them (CLIP's last)."""
    later = not hub_encoder(config).ends_early
    return _with(source, lambda name: name.startswith("post_layernorm.") or (later and name.startswith(_LAYER)))


def whole_encoder(config: Config, source: Source) -> Sequence[EncoderPart]:
    """The encoder with all that its published folder has, a pooling head for example."""
    hub_encoder(config)
    return _with(source, lambda name: True)


def _with(source: Source, kept: Callable[[str], bool]) -> list[EncoderPart]:
    """The tensors that are read, and those of the others that are `kept`, under names without the folder's prefix."""
    read = list(source.parts["vision"])
    used = {part.name for part in read}
    others = [name for name in source.stored if name.startswith(source.vision) and name not in used]
    read += [
        Part(name=name, shape=source.stored[name].shape, ours="")
        for name in others
        if kept(name.removeprefix(source.vision))
    ]
    return [EncoderPart(written=replace(one, name=one.name.removeprefix(source.vision)), read=one) for one in read]


def layers_in(parts: Sequence[EncoderPart]) -> int:
    """The number of layers in an encoder's tensors."""
    names = (one.written.name for one in parts)
    return 1 + max(int(name.removeprefix(_LAYER).split(".")[0]) for name in names if name.startswith(_LAYER))
