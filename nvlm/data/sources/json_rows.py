"""Records from JSON files, in any form. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from nvlm.config.data import FileSource
from nvlm.data.forms import auto
from nvlm.data.record import First
from nvlm.data.remote import Remote
from nvlm.data.sources.files import files_of, image_root
from nvlm.data.sources.json_file import JsonFile, first_rows
from nvlm.data.sources.json_places import Places
from nvlm.data.sources.rows import Form, Joined, RowRecords, first_records

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def build(source: FileSource, path: str, key: str, form: Form, places: Sequence[Places] | None = None) -> RowRecords:
    """The records of the files that `path` names. `places`: of each file's rows, if known. Raises ConfigError."""
    return records_of(path, key, form, source.root, places)


def searched(source: FileSource, path: str, key: str) -> list[Path | Remote]:
    """The files, all of which must be read to find their rows."""
    return files_of(path, SUFFIXES, key)


def first(source: FileSource, path: str, key: str, form: Form) -> First:
    """The first records, of which no more is read than is used."""
    files = files_of(path, SUFFIXES, key)
    rows = chain.from_iterable(first_rows(str(file), key) for file in files)
    return first_records(key, path, rows, form, image_root(path, source.root, key))


def records_of(
    path: str,
    key: str = "data.path",
    form: Form = auto.read,
    root: str | None = None,
    places: Sequence[Places] | None = None,
) -> RowRecords:
    """The records of the files that `path` names, which the setting `key` holds. Raises ConfigError."""
    files = json_files(files_of(path, SUFFIXES, key), key, places)
    return RowRecords(files[0] if len(files) == 1 else Joined(files), form, image_root(path, root, key))


def json_files(paths: Sequence[Path | Remote], key: str, places: Sequence[Places] | None = None) -> list[JsonFile]:
    """The rows of each file. `places`: of each file's rows, if known."""
    known = places or [None] * len(paths)
    return [JsonFile(str(path), key, found) for path, found in zip(paths, known, strict=True)]
