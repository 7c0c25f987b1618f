"""NVLM-H."""

from __future__ import annotations

from functools import partial

from megatron.core.transformer import ModuleSpec

from nvlm.arch.base import Architecture
from nvlm.arch.decoder.fusion import fill
from nvlm.arch.hybrid.description import DESCRIPTION
from nvlm.arch.hybrid.fusion import TaggedTileKeys
from nvlm.arch.xattn.attention import GatedCrossAttention
from nvlm.config.values import ArchConfig


def architecture(arch: ArchConfig) -> Architecture:
    """The NVLM-H architecture."""
    cross = ModuleSpec(module=GatedCrossAttention, params={"init_std": arch.cross_std})
    keys = partial(TaggedTileKeys, bind_tags=arch.bind_tags)
    return Architecture(DESCRIPTION, stream=fill, keys=keys, cross_attention=cross)
