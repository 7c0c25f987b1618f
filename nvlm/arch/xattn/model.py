"""NVLM-X."""

from __future__ import annotations

from megatron.core.transformer import ModuleSpec

from nvlm.arch.base import Architecture
from nvlm.arch.xattn.attention import GatedCrossAttention
from nvlm.arch.xattn.fusion import TileKeys
from nvlm.arch.xattn.placement import placement
from nvlm.config.values import ArchConfig


def architecture(arch: ArchConfig) -> Architecture:
    """NVLM-X as values."""
    cross = ModuleSpec(module=GatedCrossAttention, params={"init_std": arch.cross_std})
    return Architecture(
        "xattn", placement, projector="affine", stream=None, keys=TileKeys, tags_in_keys=False, cross_attention=cross
    )
