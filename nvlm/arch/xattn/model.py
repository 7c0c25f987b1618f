"""NVLM-X."""

from __future__ import annotations

from megatron.core.transformer import ModuleSpec

from nvlm.arch.base import Architecture
from nvlm.arch.xattn.attention import GatedCrossAttention
from nvlm.arch.xattn.description import DESCRIPTION
from nvlm.arch.xattn.fusion import TileKeys
from nvlm.config.values import ArchConfig


def architecture(arch: ArchConfig) -> Architecture:
    """The NVLM-X architecture."""
    cross = ModuleSpec(module=GatedCrossAttention, params={"init_std": arch.cross_std})
    return Architecture(DESCRIPTION, stream=None, keys=TileKeys, cross_attention=cross)
