"""What no layout but the trainer's own can hold."""

from __future__ import annotations

from nvlm.arch.registry import description
from nvlm.config.values import Config, problem
from nvlm.inputs.whole import projector_type

GENERATE = "answer with launch/generate.py, which needs no export"


def one_tile(config: Config) -> bool:
    """Whether every image is one tile, with nothing after it."""
    tiling = config.tiling
    alone = tiling.max_tiles == 1 if tiling.kind == "dhr" else not (tiling.pinpoints or tiling.newline)
    return alone and tiling.kind != "crops"


def check_decoder(config: Config) -> None:
    """Raise ConfigError unless the model is a decoder whose pictures stand in the text without tags."""
    kind = description(config.arch.name)
    if kind.keys:
        expected = "arch=decoder: no class of LLaVA or VILA has cross-attention"
        raise problem("arch", kind.title, expected, "layout=nvlm")
    if config.vision.order != "rows" and projector_type(config) != "mlp_downsample":
        expected = "rows: by columns stand only the tokens of VILA's mlp_downsample"
        raise problem("vision.order", config.vision.order, expected, GENERATE)
    if config.data.image_marks:
        raise problem("data.image_marks", True, "false: no processor of LLaVA or VILA writes NVLM's marks", GENERATE)
    if config.tiling.tag != "none":
        raise problem("tiling.tag", config.tiling.tag, "none: no processor of LLaVA or VILA writes tags", GENERATE)
