"""The sources of records, by schema. Imports no torch.

The module of a source of files provides `build(schema, path, key, form)`, all records of the files that `path` names,
and `first(schema, path, key, form)`, the first of them, which are checked before a run starts. `key` is the setting
that holds `path`, for messages; `form` makes records of its rows. A module whose JSON files must be read whole to find
their rows also provides `searched(schema, path, key)`, these files, and its `build` takes their `places`, if known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from nvlm.config.data import (
    Blend,
    Colours,
    DataConfig,
    Datasets,
    Generated,
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
from nvlm.data.remote import Remote
from nvlm.data.sources import colours, documents, json_rows, pages, parquet, saved, tars
from nvlm.data.sources.json_places import Places

_GENERATED = {Pages: pages, Colours: colours}
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


def build_records(
    data: DataConfig, seed: int, heldout: bool = False, places: Mapping[str, Sequence[Places]] | None = None
) -> Records | None:
    """The training or held-out records of `data`; None if the source has no held-out part. Raises ConfigError.

    `places`: where the rows of each source's searched files are, by the source's name; by default, they are searched.
    """
    known = places or {}
    parts = named_sources(data.source).items()
    built = {name: build_source(part, name, seed, heldout, known.get(name)) for name, part in parts}
    found = {name: records for name, records in built.items() if records is not None}
    if not isinstance(data.source, Blend) or not found:
        return found.get("")
    texts = frozenset(name for name, part in data.source.sources.items() if part.text_only)
    return Interleaved(Blended(found, texts)) if heldout else Blended(found, texts)


def named_sources(source: Source) -> dict[str, Source]:
    """The sources of a blend by name; a single source has the name ""."""
    return {name: part.source for name, part in source.sources.items()} if isinstance(source, Blend) else {"": source}


def prefix_of(name: str) -> str:
    """What the keys of the source `name` begin with."""
    return f"data.sources.{name}." if name else "data."


def build_source(
    source: Source, name: str, seed: int, heldout: bool = False, places: Sequence[Places] | None = None
) -> Records | None:
    """The records of `source`, whose name is `name`; None if it has no held-out part. Raises ConfigError."""
    if isinstance(source, Generated):
        return _GENERATED[type(source)].build(source, seed, heldout)
    key, path = _place(source, heldout, prefix_of(name))
    if not path:
        return None
    module, known = _MODULES[type(source)], {"places": places} if places else {}
    return module.build(source, path, key, form_of(source, seed), **known)


def searched_files(source: Source, name: str) -> Sequence[Path | Remote]:
    """The files of `source` that must be read whole to find their rows. Raises ConfigError."""
    searched = None if isinstance(source, Generated) else getattr(_MODULES[type(source)], "searched", None)
    if searched is None:
        return ()
    key, path = _place(source, False, prefix_of(name))
    return searched(source, path, key)


def first_records(source: Source, heldout: bool = False) -> Iterator[First]:
    """The first records of each source of files, read one by one."""
    for name, one in named_sources(source).items():
        key, path = (None, None) if isinstance(one, Generated) else _place(one, heldout, prefix_of(name))
        if key and (path or not heldout):
            yield _MODULES[type(one)].first(one, path or "", key, form_of(one))


def _place(source: Source, heldout: bool, prefix: str) -> tuple[str, str | None]:
    """The key that names the training or held-out files, and its value."""
    return (f"{prefix}heldout_path", source.heldout_path) if heldout else (f"{prefix}path", source.path)
