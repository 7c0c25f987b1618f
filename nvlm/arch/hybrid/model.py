"""NVLM-H."""

from __future__ import annotations

from functools import partial

from megatron.core.transformer import ModuleSpec

from nvlm.arch.base import Architecture
from nvlm.arch.hybrid.fusion import HybridFusion
from nvlm.arch.hybrid.layout import layout
from nvlm.arch.xattn.attention import GatedCrossAttention
from nvlm.config import ArchConfig


def architecture(arch: ArchConfig) -> Architecture:
    """NVLM-H as values."""
    cross = ModuleSpec(module=GatedCrossAttention, params={"init_std": arch.cross_std})
    return Architecture("hybrid", layout, "mlp", partial(HybridFusion, bind_tags=arch.bind_tags), cross_attention=cross)
