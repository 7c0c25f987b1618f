"""A Qwen2- or Llama-shaped model's tensors under their Hugging Face names, for our Megatron modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nvlm.config import LLMConfig

_WORDS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ENDS = {_WORDS: "embedding.word_embeddings.weight", "model.norm.weight": "decoder.final_layernorm.weight"}
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
# No published model has these: the names are ours, in the style of the others.
_CROSS = {
    "cross_attn.norm.weight": "pre_cross_attn_layernorm.weight",
    "cross_attn.q_proj.weight": "cross_attention.linear_q.weight",
    "cross_attn.o_proj.weight": "cross_attention.linear_proj.weight",
    "cross_attn.gate": "cross_attention.gate",
}


def _table(llm: LLMConfig, cross: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Our name -> the HF names whose tensors it joins. `cross`: 1-based layers with gated cross-attention."""
    table = {ours: (hf,) for hf, ours in _ENDS.items()}
    if not llm.tied:
        table["output_layer.weight"] = (_HEAD,)
    for layer in range(llm.layers):
        hf, ours = f"model.layers.{layer}", f"decoder.layers.{layer}"
        for kind in ("weight", "bias") if llm.qkv_bias else ("weight",):
            names = tuple(f"{hf}.self_attn.{part}_proj.{kind}" for part in "qkv")
            table[f"{ours}.self_attention.linear_qkv.{kind}"] = names
        table[f"{ours}.mlp.linear_fc1.weight"] = (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight")
        if layer + 1 in cross:
            names = tuple(f"{hf}.cross_attn.{part}_proj.weight" for part in "kv")
            table[f"{ours}.cross_attention.linear_kv.weight"] = names
        whole = _LAYER | _CROSS if layer + 1 in cross else _LAYER
        table |= {f"{ours}.{o}": (f"{hf}.{h}",) for h, o in whole.items()}
    return table


def from_huggingface(tensors: Mapping[str, Tensor], llm: LLMConfig, cross: Sequence[int] = ()) -> dict[str, Tensor]:
    """Our state dict from HF names (`model.*`, `lm_head.*`). Missing or surplus names raise ValueError.

    HF holds queries, keys and values apart; Megatron wants them key-value group by group: [the group's
    queries, its key, its value]. With tied embeddings a `lm_head.weight` that is there all the same is left
    out.
    """
    table = _table(llm, cross)
    expected = {hf for names in table.values() for hf in names}
    given = set(tensors) - ({_HEAD} if llm.tied else set())
    missing, surplus = sorted(expected - given), sorted(given - expected)
    if missing or surplus:
        counts = f"missing {missing[:3]} of {len(missing)}, surplus {surplus[:3]} of {len(surplus)}"
        raise ValueError(f"language model weights: {counts}")
    return {ours: _join(ours, [tensors[hf] for hf in names], llm) for ours, names in table.items()}


def to_huggingface(state: Mapping[str, Tensor], llm: LLMConfig, cross: Sequence[int] = ()) -> dict[str, Tensor]:
    """The inverse of `from_huggingface`; it maps gradients as well as weights."""
    out = {}
    for ours, names in _table(llm, cross).items():
        out |= zip(names, _split(ours, state[ours], llm, len(names)))
    return {name: tensor.detach().clone().contiguous() for name, tensor in out.items()}


def _join(ours: str, parts: list[Tensor], llm: LLMConfig) -> Tensor:
    if ".linear_fc1." in ours or len(parts) == 1:
        return torch.cat(parts)
    # [rows] -> [groups, rows of one group]: heads / kv_heads heads of queries, one of keys, one of values.
    grouped = [part.unflatten(0, (llm.kv_heads, -1)) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split(ours: str, tensor: Tensor, llm: LLMConfig, parts: int) -> Sequence[Tensor]:
    if ".linear_fc1." in ours or parts == 1:
        return tensor.chunk(parts)
    queries = [llm.heads // llm.kv_heads * llm.head_dim] if parts == 3 else []
    grouped = tensor.unflatten(0, (llm.kv_heads, -1))
    return [part.flatten(0, 1) for part in grouped.split([*queries, llm.head_dim, llm.head_dim], dim=1)]
