"""Where the frozen encoder's published weights are, checked before anything is read. Imports no torch."""

from __future__ import annotations

from nvlm.config.values import Config, VisionConfig, problem
from nvlm.vision.encoders.registry import description_of
from nvlm.weights.parts import below
from nvlm.weights.published import RELEASE_CODE, VISION, Source, check_tensors, read_config, read_headers


def vision_source(config: Config) -> Source:
    """The published folder that holds the frozen encoder, checked; ConfigError where it is not what it should be."""
    for key in ("vision", "release"):
        if folder := getattr(config.init, key):
            shipped = description_of(config.vision).shipped
            return _read(config.vision, str(shipped.get(folder, folder)), f"init.{key}")
    raise problem("init.vision", "nothing", "the frozen encoder's weights", "init.vision=DIR, or vision=tiny")


def _read(vision: VisionConfig, folder: str, key: str) -> Source:
    encoder = description_of(vision)
    stored = read_headers(folder, key)
    values = read_config(folder, key, (*encoder.code, *RELEASE_CODE)) or {}
    inside = any(name.startswith(VISION) for name in stored)  # a whole model's folder
    if inside:
        stored = {name: one for name, one in stored.items() if name.startswith(VISION)}
    prefix = VISION if inside else ""
    if values:
        encoder.check_config(values.get("vision_config") or values, vision, key)
    parts = below(prefix, encoder.parts(vision, {name.removeprefix(prefix): one for name, one in stored.items()}))
    check_tensors(parts, stored, key)
    return Source(key, folder, {"vision": parts}, stored)
