"""NVLM-D."""

from __future__ import annotations

from nvlm.arch.base import Architecture
from nvlm.arch.decoder.fusion import fill
from nvlm.arch.decoder.placement import placement
from nvlm.config.values import ArchConfig


def architecture(arch: ArchConfig) -> Architecture:
    """NVLM-D as values."""
    return Architecture(
        "decoder", placement, projector="mlp", stream=fill, keys=None, tags_in_keys=False, cross_attention=None
    )
