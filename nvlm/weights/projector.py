"""The projector's tensors (`mlp1.*`, as NVLM-D-72B names them) and the norms of keys, for our Megatron modules."""

from __future__ import annotations

from nvlm.config.values import Config
from nvlm.weights.parts import Part


def parts(config: Config) -> list[Part]:
    """LayerNorm, then two linears, or one for NVLM-X."""
    width, llm = config.vision.hidden * config.vision.downsample**2, config.llm
    found = [Part(name=f"mlp1.0.{kind}", shape=(width,), ours=f"projector.norm.{kind}") for kind in ("weight", "bias")]
    linear = "projector.layers.encoder"
    if config.arch.name == "xattn":
        return [*found, Part(name="mlp1.1.weight", shape=(llm.hidden, width), ours=f"{linear}.weight", split=0)]
    inner = Part(name="mlp1.1.weight", shape=(llm.ffn, width), ours=f"{linear}.linear_fc1.weight", split=0)
    outer = Part(name="mlp1.3.weight", shape=(llm.hidden, llm.ffn), ours=f"{linear}.linear_fc2.weight", split=1)
    return [*found, inner, outer]


def key_norms(config: Config) -> list[Part]:
    """Norms of tiles (NVLM-X and -H) and of tags (-H). No published model has them: the names are ours."""
    kinds = {"decoder": (), "xattn": ("tile_norm",), "hybrid": ("tile_norm", "tag_norm")}[config.arch.name]
    shape = (config.llm.hidden,)
    return [Part(name=f"cross_keys.{k}.weight", shape=shape, ours=f"fusion.{k}.weight") for k in kinds]
