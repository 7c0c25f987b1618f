"""Records from JSON files, in any form. Imports no torch."""

from __future__ import annotations

from itertools import chain

from nvlm.config.data import FileSource
from nvlm.data.forms import auto
from nvlm.data.record import First
from nvlm.data.sources.files import files_of, image_root
from nvlm.data.sources.json_file import JsonFile, first_rows
from nvlm.data.sources.rows import Form, Joined, RowRecords, first_records

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def build(source: FileSource, path: str, key: str, form: Form) -> RowRecords:
    """The records of the files that `path` names. Raises ConfigError."""
    return records_of(path, key, form, source.root)


def first(source: FileSource, path: str, key: str, form: Form) -> First:
    """The first records, of which no more is read than is used."""
    files = files_of(path, SUFFIXES, key)
    rows = chain.from_iterable(first_rows(str(file), key) for file in files)
    return first_records(key, path, rows, form, image_root(path, source.root, key))


def records_of(path: str, key: str = "data.path", form: Form = auto.read, root: str | None = None) -> RowRecords:
    """The records of the files that `path` names, which the setting `key` holds. Raises ConfigError."""
    files = [JsonFile(str(file), key) for file in files_of(path, SUFFIXES, key)]
    return RowRecords(files[0] if len(files) == 1 else Joined(files), form, image_root(path, root, key))
