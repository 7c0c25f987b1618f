"""The encoders by name. Imports no torch."""

from __future__ import annotations

from nvlm.config.values import Config, VisionConfig, problem
from nvlm.vision.encoders.clip.description import CLIP
from nvlm.vision.encoders.interface import EncoderDescription
from nvlm.vision.encoders.internvit.description import INTERNVIT
from nvlm.vision.encoders.siglip.description import SIGLIP

ENCODERS: dict[str, EncoderDescription] = {one.name: one for one in (INTERNVIT, SIGLIP, CLIP)}


def description_of(vision: VisionConfig) -> EncoderDescription:
    """The description that `vision.encoder` names. Raises ConfigError if there is none."""
    if vision.encoder not in ENCODERS:
        known = f"one of {', '.join(ENCODERS)}"
        raise problem("vision.encoder", repr(vision.encoder), known, f"vision.encoder={next(iter(ENCODERS))}")
    return ENCODERS[vision.encoder]


def check_encoder(config: Config) -> Config:
    """Return `config`, or raise ConfigError if its encoder is unknown or does not allow its settings."""
    encoder = description_of(config.vision)
    for name, value in encoder.fixed.items():
        got = getattr(config.vision, name)
        if got != value:
            typed = str(value).lower() if isinstance(value, bool) else value
            expected = f"{typed}: vision.encoder={encoder.name} has no other"
            raise problem(f"vision.{name}", got, expected, f"vision.{name}={typed}")
    vision = config.vision
    if vision.tile_size % vision.patch and not encoder.crops:
        fix = f"vision.tile_size={max(1, vision.tile_size // vision.patch) * vision.patch}"
        raise problem("vision.tile_size", vision.tile_size, f"a multiple of vision.patch={vision.patch}", fix)
    return config
