"""What writing an export in one layout takes, as a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvlm.config.values import Config
from nvlm.export.text import Text
from nvlm.weights.layouts import Layout
from nvlm.weights.parts import Part
from nvlm.weights.published import Source

Files = Mapping[str, str | Path]
"""Contents by name, which may be in a subfolder: a text, or a file to copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderPart:
    """A part of the encoder's tensors, as it is written (without a prefix) and as it is read from `source`."""

    written: Part
    read: Part
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What an export's files describe."""

    config: Config  # the run's, with as many words as the folder has
    text: Text | None  # the tokenizer's files
    encoder: Source
    layers: int  # of the encoder, those included that no feature comes from
    code: Mapping[str, Path]  # the release's own modelling code, if the run started from a release


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One layout of exports."""

    layout: Layout
    check: Callable[[Config], None]  # raises ConfigError if no folder in this layout can hold the run's model
    # From the encoder, and the folder with those of its class's tensors that no feature comes from:
    encoder: Callable[[Config, Source, Source], Sequence[EncoderPart]]
    text: Callable[[Config], Text | None]  # raises ConfigError without a tokenizer that the layout needs
    rows: Callable[[Config, Text | None], int]  # of embedding and output layer
    files: Callable[[Written], Files]
    note: Callable[[Written], str | None]  # a line about who can load the folder
