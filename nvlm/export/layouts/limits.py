"""What no layout but the trainer's own can hold."""

from __future__ import annotations

from nvlm.arch.registry import description
from nvlm.config.values import Config, problem

GENERATE = "answer with launch/generate.py, which needs no export"


def check_decoder(config: Config) -> None:
    """Raise ConfigError unless the model is a decoder whose pictures stand in the text without tags."""
    kind = description(config.arch.name)
    if kind.keys:
        expected = "arch=decoder: no class of LLaVA or VILA has cross-attention"
        raise problem("arch", kind.title, expected, "layout=nvlm")
    if config.tiling.tag != "none":
        raise problem("tiling.tag", config.tiling.tag, "none: no processor of LLaVA or VILA writes tags", GENERATE)
