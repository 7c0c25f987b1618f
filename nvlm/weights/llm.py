"""Maps the published tensors of Llama, Mistral, Qwen2 and Qwen3 (`model.*`, `lm_head.*`) to our Megatron modules.

Queries, keys and values are published separately; Megatron stores them by key-value group: [the group's queries, its
key, its value]. Gate and up are concatenated; each tensor-parallel rank has its share of gate, then its share of up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nvlm.config.values import LLMConfig
from nvlm.weights.parts import Part

WORDS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def parts(llm: LLMConfig, cross: Sequence[int] = ()) -> list[Part]:
    """All tensors, in the model's order. `cross`: layers (from 1) with gated cross-attention."""
    words = dict(shape=(llm.vocab, llm.hidden), split=0, padded=llm.padded_vocab)
    found = [Part(name=WORDS, ours="embedding.word_embeddings.weight", **words)]
    for layer in range(llm.layers):
        found += _layer(llm, layer)
        found += _cross_attention(llm, layer) if layer + 1 in cross else []
    found.append(Part(name="model.norm.weight", shape=(llm.hidden,), ours="decoder.final_layernorm.weight"))
    return found if llm.tied else [*found, Part(name=HEAD, ours="output_layer.weight", **words)]


def _layer(llm: LLMConfig, layer: int) -> Iterator[Part]:
    hf, ours = f"model.layers.{layer}", f"decoder.layers.{layer}"
    width = llm.heads * llm.head_dim
    yield Part(name=f"{hf}.input_layernorm.weight", shape=(llm.hidden,), ours=f"{ours}.input_layernorm.weight")
    qkv = f"{ours}.self_attention.linear_qkv"
    yield from _grouped(llm, f"{hf}.self_attn", "qkv", f"{qkv}.weight", (llm.hidden,))
    if llm.qkv_bias:
        yield from _grouped(llm, f"{hf}.self_attn", "qkv", f"{qkv}.bias", ())
    for kind in "qk" if llm.qk_norm else "":
        norm = f"{ours}.self_attention.{kind}_layernorm.weight"
        yield Part(name=f"{hf}.self_attn.{kind}_norm.weight", shape=(llm.head_dim,), ours=norm)
    out, proj = f"{hf}.self_attn.o_proj.weight", f"{ours}.self_attention.linear_proj.weight"
    yield Part(name=out, shape=(llm.hidden, width), ours=proj, split=1)
    norm = f"{ours}.pre_mlp_layernorm.weight"
    yield Part(name=f"{hf}.post_attention_layernorm.weight", shape=(llm.hidden,), ours=norm)
    for half, name in enumerate(("gate_proj", "up_proj")):
        fc1 = dict(shape=(llm.ffn, llm.hidden), ours=f"{ours}.mlp.linear_fc1.weight", split=0)
        yield Part(name=f"{hf}.mlp.{name}.weight", offset=half * llm.ffn, **fc1)
    fc2 = f"{ours}.mlp.linear_fc2.weight"
    yield Part(name=f"{hf}.mlp.down_proj.weight", shape=(llm.hidden, llm.ffn), ours=fc2, split=1)


def _cross_attention(llm: LLMConfig, layer: int) -> Iterator[Part]:
    """No published model has these tensors: the names are ours, in the same style."""
    hf, ours = f"model.layers.{layer}.cross_attn", f"decoder.layers.{layer}"
    width = llm.heads * llm.head_dim
    norm = f"{ours}.pre_cross_attn_layernorm.weight"
    yield Part(name=f"{hf}.norm.weight", shape=(llm.hidden,), ours=norm)
    query, proj = f"{ours}.cross_attention.linear_q.weight", f"{ours}.cross_attention.linear_proj.weight"
    yield Part(name=f"{hf}.q_proj.weight", shape=(width, llm.hidden), ours=query, split=0)
    yield from _grouped(llm, hf, "kv", f"{ours}.cross_attention.linear_kv.weight", (llm.hidden,))
    yield Part(name=f"{hf}.o_proj.weight", shape=(llm.hidden, width), ours=proj, split=1)
    yield Part(name=f"{hf}.gate", shape=(1,), ours=f"{ours}.cross_attention.gate")


def _grouped(llm: LLMConfig, hf: str, kinds: str, ours: str, columns: tuple[int, ...]) -> Iterator[Part]:
    """Projections that share one of our linears, in which each key-value group has rows of every kind."""
    offset = 0
    for kind in kinds:
        heads = llm.heads if kind == "q" else llm.kv_heads
        name = f"{hf}.{kind}_proj.{ours.rpartition('.')[2]}"
        shape = (heads * llm.head_dim, *columns)
        yield Part(name=name, shape=shape, ours=ours, split=0, groups=llm.kv_heads, offset=offset)
        offset += heads // llm.kv_heads * llm.head_dim
