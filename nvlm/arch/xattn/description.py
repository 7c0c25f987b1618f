"""The description of NVLM-X."""

from __future__ import annotations

from nvlm.arch.description import Description
from nvlm.config.modules import Attention, Branch, Linear, Norm, Parameter
from nvlm.config.values import LLMConfig


def gated_cross_attention(llm: LLMConfig) -> tuple[Branch, ...]:
    """The norm of the queries, then the modules of nvlm.arch.xattn.attention.GatedCrossAttention."""
    h, q, kv = llm.hidden, llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim
    place, own = "cross_attention", dict(group="xattn")
    modules = (
        Norm(name="pre_cross_attn_layernorm", width=h, **own),
        Linear(name=f"{place}.linear_q", inputs=h, outputs=q, split="outputs", **own),
        Linear(name=f"{place}.linear_kv", inputs=h, outputs=2 * kv, split="outputs", reads_keys=True, **own),
        Attention(heads=llm.heads, kv_heads=llm.kv_heads, head_dim=llm.head_dim, sees="keys"),
        Linear(name=f"{place}.linear_proj", inputs=q, outputs=h, split="inputs", **own),
        Parameter(name=f"{place}.gate", size=1, factor=True, **own),
    )
    return (Branch(part="cross", modules=modules),)


DESCRIPTION = Description(
    title="NVLM-X",
    tiles_in_stream=False,
    keys=("tile",),
    projector="affine",
    carried=gated_cross_attention,
    joins_text=False,
    release_code=None,
)
