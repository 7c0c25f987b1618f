"""Parameters by arithmetic, without building anything or importing torch."""

from __future__ import annotations

from nvlm.config.values import Config, LLMConfig, VisionConfig, cross_layers


def llm_parameters(llm: LLMConfig) -> int:
    """Embedding, layers, final norm and output layer of the language model."""
    q, kv = llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim
    attention = llm.hidden * (q + 2 * kv) + q * llm.hidden + (q + 2 * kv if llm.qkv_bias else 0)
    layer = attention + 3 * llm.hidden * llm.ffn + 2 * llm.hidden
    return llm.padded_vocab * llm.hidden * (1 if llm.tied else 2) + llm.layers * layer + llm.hidden


def vision_parameters(vision: VisionConfig) -> int:
    """The encoder with its embeddings."""
    d, patches = vision.hidden, (vision.tile_size // vision.patch) ** 2
    linears = 3 * d * d + d * d + d + 2 * d * vision.ffn + vision.ffn + d
    norms = (4 if vision.norm == "layer" else 2) * d + (2 * d if vision.qk_norm else 0)
    layer = linears + (3 * d if vision.qkv_bias else 0) + norms + 2 * d  # and layer scale
    return vision.layers * layer + 3 * vision.patch**2 * d + d + d + (patches + 1) * d


def projector_parameters(config: Config) -> int:
    """LayerNorm and one (X) or two (D, H) linears."""
    width = config.vision.hidden * config.vision.downsample**2
    if config.arch.name == "xattn":
        return 2 * width + width * config.llm.hidden
    return 2 * width + width * config.llm.ffn + config.llm.ffn * config.llm.hidden


def cross_parameters(config: Config) -> int:
    """All gated cross-attention layers (query norm, q, k, v, o, gate) and the norms of tiles (X, H) and tags (H)."""
    llm = config.llm
    q, kv = llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim
    layers = len(cross_layers(config)) * (llm.hidden + llm.hidden * (2 * q + 2 * kv) + 1)
    return layers + {"decoder": 0, "xattn": 1, "hybrid": 2}[config.arch.name] * llm.hidden


def adapter_parameters(config: Config) -> dict[str, int]:
    """Parameters of the adapters by module group: rank x (inputs + outputs) for each linear."""
    llm, peft = config.llm, config.peft
    q, kv = llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim
    attention = (llm.hidden + q + 2 * kv) + (q + llm.hidden)
    mlp = (llm.hidden + 2 * llm.ffn) + (llm.ffn + llm.hidden)
    cross = (llm.hidden + q) + (llm.hidden + 2 * kv) + (q + llm.hidden)
    widths = {"llm": llm.layers * (attention + mlp), "xattn": len(cross_layers(config)) * cross}
    return {group: peft.rank * widths[group] for group in config.adapted}


def parameters(config: Config) -> dict[str, int]:
    """Parameters by module group, adapters included."""
    counts = {
        "vision": vision_parameters(config.vision),
        "projector": projector_parameters(config),
        "xattn": cross_parameters(config),
        "llm": llm_parameters(config.llm),
    }
    adapters = adapter_parameters(config)
    return {group: count + adapters.get(group, 0) for group, count in counts.items()}
