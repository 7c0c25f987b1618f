"""The module group of a parameter, by its name in the unsplit model. Imports no torch."""

from __future__ import annotations

import re

_OF_MODULES = {
    "vision": "vision",
    "projector": "projector",
    "fusion": "xattn",
    "embedding": "llm",
    "output_layer": "llm",
    "decoder.final_layernorm": "llm",
    "decoder.layers.input_layernorm": "llm",
    "decoder.layers.self_attention": "llm",
    "decoder.layers.pre_mlp_layernorm": "llm",
    "decoder.layers.mlp": "llm",
    "decoder.layers.pre_cross_attn_layernorm": "xattn",
    "decoder.layers.cross_attention": "xattn",
}


def parameter_group(name: str) -> str:
    """The module group of the parameter `name` of a VisionLanguageModel.

    Raises ValueError if it is in none: it would otherwise be frozen, counted and loaded with the wrong group.
    """
    whole = re.sub(r"^(decoder\.layers)\.\d+", r"\1", name)
    for module, group in _OF_MODULES.items():
        if whole.startswith(f"{module}."):
            return group
    raise ValueError(f"parameter {name}: got no module group, expected one of {', '.join(_OF_MODULES)}")
