"""The sources of records, by schema. Imports no torch.

A source's module provides `build(schema, seed, heldout)`, all of its records, and `first(schema, heldout)`, its first
records, which are checked before a run starts. Both return None if the source has no held-out part; `first` also if
users cannot supply wrong records.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nvlm.config.data import DataConfig, Jsonl, Llava, Pages, Source
from nvlm.data import jsonl, llava, pages
from nvlm.data.record import First, Record

_MODULES = {Pages: pages, Jsonl: jsonl, Llava: llava}


class Records(Protocol):
    """A sequence of records; reading a bad one raises BadRecord."""

    @property
    def files(self) -> Sequence[Path]:
        """The files they are read from, whose content identifies them; empty if records are generated."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...
    def name(self, index: int) -> str:
        """The name of the record in skipped.jsonl."""
        ...

    def kind(self, index: int) -> str:
        """The kind of its first question, for scores per kind."""
        ...


def build_records(data: DataConfig, seed: int, heldout: bool = False) -> Records | None:
    """The training or held-out records of `data`; None if the source has no held-out part."""
    return _MODULES[type(data.source)].build(data.source, seed, heldout)


def first_records(source: Source, heldout: bool = False) -> First | None:
    """The first records of `source`, read one by one; None if there is nothing to check."""
    return _MODULES[type(source)].first(source, heldout)
