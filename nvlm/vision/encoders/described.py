"""What pre-norm encoder layers are made of, as values. Imports no torch."""

from __future__ import annotations

from nvlm.config.modules import Activation, Attention, Linear, Module, Norm, Parameter
from nvlm.config.values import VisionConfig


def layer_modules(vision: VisionConfig, scaled: bool = False) -> tuple[Module, ...]:
    """Self-attention and MLP, each after its norm. `scaled`: each branch ends with a layer scale."""
    return (*_attention(vision, scaled), *_mlp(vision, scaled))


def _attention(vision: VisionConfig, scaled: bool) -> tuple[Module, ...]:
    d, place, own = vision.hidden, "self_attention", dict(group="vision")
    of_heads = [Norm(name=f"{place}.{which}_layernorm", width=d, **own) for which in "qk"]
    return (
        Norm(name="input_layernorm", width=d, bias=vision.norm == "layer", **own),
        Linear(name=f"{place}.linear_qkv", inputs=d, outputs=3 * d, bias=vision.qkv_bias, **own),
        *(of_heads if vision.qk_norm else ()),
        Attention(heads=vision.heads, kv_heads=vision.heads, head_dim=d // vision.heads, sees="all"),
        Linear(name=f"{place}.linear_proj", inputs=d, outputs=d, bias=True, **own),
        *_scale(place, d, scaled),
    )


def _mlp(vision: VisionConfig, scaled: bool) -> tuple[Module, ...]:
    d, own = vision.hidden, dict(group="vision")
    return (
        Norm(name="pre_mlp_layernorm", width=d, bias=vision.norm == "layer", **own),
        Linear(name="mlp.linear_fc1", inputs=d, outputs=vision.ffn, bias=True, **own),
        Activation(width=vision.ffn),
        Linear(name="mlp.linear_fc2", inputs=vision.ffn, outputs=d, bias=True, **own),
        *_scale("mlp", d, scaled),
    )


def _scale(place: str, width: int, scaled: bool) -> tuple[Module, ...]:
    return (Parameter(name=f"{place}.layer_scale.weight", group="vision", size=width, factor=True),) if scaled else ()
