"""The sources of records, by schema. Imports no torch.

The module of a source of files provides `build(schema, path, key, form)`, all records of the files that `path` names,
and `first(schema, path, key, form)`, the first of them, which are checked before a run starts. `key` is the setting
that holds `path`, for messages; `form` makes records of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nvlm.config.data import DataConfig, Datasets, Jsonl, Llava, Pages, Parquet, Source, Texts
from nvlm.data.forms.auto import form_of
from nvlm.data.record import First, Record
from nvlm.data.sources import documents, json_rows, pages, parquet, saved

_MODULES = {Jsonl: json_rows, Llava: json_rows, Texts: documents, Parquet: parquet, Datasets: saved}


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
    """The training or held-out records of `data`; None if the source has no held-out part. Raises ConfigError."""
    return _build(data.source, seed, heldout, "data.")


def _build(source: Source, seed: int, heldout: bool, prefix: str) -> Records | None:
    if isinstance(source, Pages):
        return pages.build(source, seed, heldout)
    key, path = _place(source, heldout, prefix)
    return _MODULES[type(source)].build(source, path, key, form_of(source, seed)) if path else None


def first_records(source: Source, heldout: bool = False) -> First | None:
    """The first records of `source`, read one by one; None if there is nothing to check."""
    if isinstance(source, Pages):
        return None
    key, path = _place(source, heldout, "data.")
    return _MODULES[type(source)].first(source, path or "", key, form_of(source)) if path or not heldout else None


def _place(source: Source, heldout: bool, prefix: str) -> tuple[str, str | None]:
    """The key that names the training or held-out files, and its value."""
    return (f"{prefix}heldout_path", source.heldout_path) if heldout else (f"{prefix}path", source.path)
