"""NVLM-D."""

from __future__ import annotations

from nvlm.arch.base import Architecture
from nvlm.arch.decoder.description import DESCRIPTION
from nvlm.arch.decoder.fusion import fill
from nvlm.config.values import ArchConfig


def architecture(arch: ArchConfig) -> Architecture:
    """The NVLM-D architecture."""
    return Architecture(DESCRIPTION, stream=fill, keys=None, cross_attention=None)
