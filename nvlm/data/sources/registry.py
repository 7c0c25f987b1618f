"""The sources of records, by schema. Imports no torch.

The module of a source of files provides `build(schema, path, key, form)`, all records of the files that `path` names,
and `first(schema, path, key, form)`, the first of them, which are checked before a run starts. `key` is the setting
that holds `path`, for messages; `form` makes records of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from nvlm.config.data import (
    Blend,
    DataConfig,
    Datasets,
    Jsonl,
    Llava,
    Mmc4,
    Obelics,
    Pages,
    Parquet,
    Source,
    Texts,
    Webdataset,
)
from nvlm.data.blend import Blended, Interleaved
from nvlm.data.forms.auto import form_of
from nvlm.data.record import First, Record
from nvlm.data.sources import documents, json_rows, pages, parquet, saved, tars

_MODULES = {
    Jsonl: json_rows,
    Llava: json_rows,
    Texts: documents,
    Obelics: documents,
    Mmc4: documents,
    Parquet: parquet,
    Datasets: saved,
    Webdataset: tars,
}


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
    if not isinstance(data.source, Blend):
        return _build(data.source, seed, heldout, "data.")
    parts = data.source.sources
    built = {name: _build(part.source, seed, heldout, f"data.sources.{name}.") for name, part in parts.items()}
    found = {name: records for name, records in built.items() if records is not None}
    texts = frozenset(name for name, part in parts.items() if part.text_only)
    return (Interleaved(Blended(found, texts)) if heldout else Blended(found, texts)) if found else None


def _build(source: Source, seed: int, heldout: bool, prefix: str) -> Records | None:
    if isinstance(source, Pages):
        return pages.build(source, seed, heldout)
    key, path = _place(source, heldout, prefix)
    return _MODULES[type(source)].build(source, path, key, form_of(source, seed)) if path else None


def first_records(source: Source, heldout: bool = False) -> Iterator[First]:
    """The first records of each source of files, read one by one."""
    named = source.sources.items() if isinstance(source, Blend) else ()
    parts = {f"data.sources.{name}.": part.source for name, part in named} or {"data.": source}
    for prefix, one in parts.items():
        key, path = (None, None) if isinstance(one, Pages) else _place(one, heldout, prefix)
        if key and (path or not heldout):
            yield _MODULES[type(one)].first(one, path or "", key, form_of(one))


def _place(source: Source, heldout: bool, prefix: str) -> tuple[str, str | None]:
    """The key that names the training or held-out files, and its value."""
    return (f"{prefix}heldout_path", source.heldout_path) if heldout else (f"{prefix}path", source.path)
