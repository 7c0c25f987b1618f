"""What can be explained. Imports no torch."""

from __future__ import annotations

from nvlm.arch.registry import description
from nvlm.config.values import Config, problem


def check_explains(config: Config) -> None:
    """Raise ConfigError if the model of `config` has no cross-attention, or a layout that is not supported."""
    kind = description(config.arch.name)
    if not kind.keys:
        expected = "NVLM-X or NVLM-H: NVLM-D has no cross-attention"
        raise problem("explain", kind.title, expected, "leave explain=... out")
    if config.parallel.pipeline > 1:
        fix = f"parallel.pipeline=1 parallel.tensor={config.parallel.replica}"
        raise problem("parallel.pipeline", config.parallel.pipeline, "1 with explain=...", fix)


def explains(config: Config) -> bool:
    """Whether the model of `config` can be explained in its layout."""
    layout = config.parallel
    return bool(description(config.arch.name).keys) and layout.pipeline == 1 and layout.context == 1
