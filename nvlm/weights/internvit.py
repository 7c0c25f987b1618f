"""InternViT's tensors under their Hugging Face names, for our Megatron modules."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_LAYER = {
    "attn.proj.weight": "self_attention.linear_proj.weight",
    "attn.proj.bias": "self_attention.linear_proj.bias",
    "attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "pre_mlp_layernorm.weight",
    "ls1": "self_attention.layer_scale.weight",
    "ls2": "mlp.layer_scale.weight",
    "mlp.fc1.weight": "mlp.linear_fc1.weight",
    "mlp.fc1.bias": "mlp.linear_fc1.bias",
    "mlp.fc2.weight": "mlp.linear_fc2.weight",
    "mlp.fc2.bias": "mlp.linear_fc2.bias",
}
_EMBEDDINGS = {
    "class_embedding": "class_embedding",
    "position_embedding": "position_embedding",
    "patch_embedding.weight": "patch_embedding.weight",
    "patch_embedding.bias": "patch_embedding.bias",
}


def from_huggingface(tensors: Mapping[str, Tensor], layers: int, heads: int) -> dict[str, Tensor]:
    """Our state dict from HF names (`embeddings.*`, `encoder.layers.*`). Missing or surplus names raise ValueError.

    HF holds qkv as [all queries | all keys | all values]; Megatron wants [q, k, v] head by head.
    """
    names = {f"embeddings.{hf}": ours for hf, ours in _EMBEDDINGS.items()}
    for layer in range(layers):
        hf, ours = f"encoder.layers.{layer}", f"decoder.layers.{layer}"
        names |= {f"{hf}.{h}": f"{ours}.{o}" for h, o in _LAYER.items()}
        names[f"{hf}.attn.qkv.weight"] = f"{ours}.self_attention.linear_qkv.weight"
    missing, surplus = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
    if missing or surplus:
        raise ValueError(
            f"encoder weights: missing {missing[:3]} of {len(missing)}, surplus {surplus[:3]} of {len(surplus)}"
        )
    return {ours: _by_head(tensors[hf], heads) if ".qkv." in hf else tensors[hf] for hf, ours in names.items()}


def to_huggingface(state: Mapping[str, Tensor], layers: int, heads: int) -> dict[str, Tensor]:
    """The inverse of `from_huggingface`."""
    out = {f"embeddings.{hf}": state[ours] for hf, ours in _EMBEDDINGS.items()}
    for layer in range(layers):
        hf, ours = f"encoder.layers.{layer}", f"decoder.layers.{layer}"
        out |= {f"{hf}.{h}": state[f"{ours}.{o}"] for h, o in _LAYER.items()}
        qkv = state[f"{ours}.self_attention.linear_qkv.weight"]
        out[f"{hf}.attn.qkv.weight"] = qkv.view(heads, 3, -1, qkv.shape[1]).transpose(0, 1).reshape(qkv.shape)
    return {name: tensor.detach().clone().contiguous() for name, tensor in out.items()}


def _by_head(qkv: Tensor, heads: int) -> Tensor:
    return qkv.view(3, heads, -1, qkv.shape[1]).transpose(0, 1).reshape(qkv.shape)
