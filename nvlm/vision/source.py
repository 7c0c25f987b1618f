"""Where the frozen encoder's published weights are, checked before anything is read. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from nvlm.config.values import Config, VisionConfig, problem
from nvlm.vision.encoders.internvit import description as internvit
from nvlm.weights.parts import below
from nvlm.weights.published import RELEASE_CODE, VISION, Source, check_tensors, read_config, read_headers

TINY = Path(__file__).with_name("tiny_encoder.safetensors")


def vision_source(config: Config) -> Source:
    """The published folder that holds the frozen encoder, checked; ConfigError where it is not what it should be."""
    for key in ("vision", "release"):
        if folder := getattr(config.init, key):
            return _vision(config.vision, str(TINY) if folder == "tiny" else folder, f"init.{key}")
    raise problem("init.vision", "nothing", "the frozen encoder's weights", "init.vision=DIR, or vision=tiny")


def _vision(vision: VisionConfig, folder: str, key: str) -> Source:
    stored = read_headers(folder, key)
    values = read_config(folder, key, (*internvit.CODE, *RELEASE_CODE)) or {}
    inside = any(name.startswith(VISION) for name in stored)  # a whole model's folder
    if inside:
        stored = {name: one for name, one in stored.items() if name.startswith(VISION)}
    prefix = VISION if inside else ""
    parts = below(prefix, internvit.parts(vision, internvit.dummy_heads(vision, stored, prefix)))
    if values:
        internvit.check_config(values.get("vision_config") or values, vision, key)
    check_tensors(parts, stored, key)
    return Source(key, folder, {"vision": parts}, stored)
