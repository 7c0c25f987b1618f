"""The sources of records by their schemas. Imports no torch.

A source's module offers `build(schema, seed, heldout)`: all of its records, and `first(schema, heldout)`: the first of
them, to be looked at before a run begins. Both return None where the source has no held-out part, and `first` where
there is nothing that a user could have got wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nvlm.config.data import DataConfig, Jsonl, Pages, Source
from nvlm.data import jsonl, pages
from nvlm.data.record import First, Record

_MODULES = {Pages: pages, Jsonl: jsonl}


class Records(Protocol):
    """A sequence of records; reading a bad one raises BadRecord."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that they are read from, whose content identifies them; empty where records are made."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...
    def name(self, index: int) -> str:
        """How skipped.jsonl calls the record."""
        ...

    def kind(self, index: int) -> str:
        """The kind of its first question, for scores by kind."""
        ...


def build_records(data: DataConfig, seed: int, heldout: bool = False) -> Records | None:
    """The training or held-out records of `data`; None where a source has no held-out part."""
    return _MODULES[type(data.source)].build(data.source, seed, heldout)


def first_records(source: Source, heldout: bool = False) -> First | None:
    """The first records of `source`, read one by one; None where there is nothing to be looked at."""
    return _MODULES[type(source)].first(source, heldout)
