"""The options of the export command. Imports no torch, so that mistakes are reported immediately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from nvlm.config.fields import Choice, Location, Range
from nvlm.config.mapping import from_mapping
from nvlm.config.values import problem


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The options of the export command."""

    checkpoint: Location
    out: Location
    vision: Location | None
    tokenizer: Location | None
    like: Location | None
    layout: Annotated[str, Choice("nvlm", "llava-hf", "llava", "vila")]
    parity: bool | None
    shard_gb: Annotated[float, Range(above=0, example=5)]


def parse(arguments: Sequence[str]) -> ExportOptions:
    """The options from the command line. Raises ConfigError."""
    values: dict[str, object] = {
        "vision": None,
        "tokenizer": None,
        "like": None,
        "layout": "nvlm",
        "parity": None,
        "shard_gb": 5.0,
    }
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise problem("command line", repr(word), "key=value", "--help lists the keys")
        values[key] = {"true": True, "false": False}.get(value, value) if key == "parity" else value
    return from_mapping(ExportOptions, values)
