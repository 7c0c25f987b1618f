"""What the command takes, as a value. Imports no torch, so that a mistake is answered at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nvlm.config import ConfigError, from_mapping, problem


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What the command takes."""

    checkpoint: str
    out: str
    vision: str | None
    tokenizer: str | None
    like: str | None
    shard_gb: float


def parse(arguments: Sequence[str]) -> ExportOptions:
    """The options, checked for their types. Raises ConfigError."""
    defaults = {"vision": None, "tokenizer": None, "like": None, "shard_gb": 5.0}
    try:
        given = OmegaConf.to_container(OmegaConf.from_dotlist(list(arguments)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"command line: {str(error).splitlines()[0]}. Fix: write key=value") from None
    options = from_mapping(ExportOptions, defaults | given)
    if options.shard_gb <= 0:
        raise problem("shard_gb", options.shard_gb, "above 0", "shard_gb=5")
    return options
