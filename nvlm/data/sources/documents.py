"""Records from files of documents: JSON, Parquet, and for texts also plain text files. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from nvlm.config.data import FileSource, Texts
from nvlm.data.record import First
from nvlm.data.remote import Remote
from nvlm.data.sources import json_rows, parquet
from nvlm.data.sources.files import files_of, image_root
from nvlm.data.sources.json_file import first_rows
from nvlm.data.sources.json_places import Places
from nvlm.data.sources.rows import Form, Joined, RowRecords, Rows, first_records, leading
from nvlm.data.sources.text_files import TextFiles

_PLAIN = (".txt",)


def build(source: FileSource, path: str, key: str, form: Form, places: Sequence[Places] | None = None) -> RowRecords:
    """The records of the files that `path` names: those of text files, of Parquet files, of JSON files. `places`: of
    each JSON file's rows, if known. Raises ConfigError."""
    others, files = _sorted(source, path, key)
    rows = [*others, *json_rows.json_files(files, key, places)]
    return RowRecords(Joined(rows), form, image_root(path, source.root, key))


def searched(source: FileSource, path: str, key: str) -> Sequence[Path | Remote]:
    """The files, all of which must be read to find their rows."""
    return _sorted(source, path, key)[1]


def first(source: FileSource, path: str, key: str, form: Form) -> First:
    """The first records, in the same order."""
    others, files = _sorted(source, path, key)
    rows = chain(*map(leading, others), *(first_rows(str(file), key) for file in files))
    return first_records(key, path, rows, form, image_root(path, source.root, key))


def _sorted(source: FileSource, path: str, key: str) -> tuple[list[Rows], Sequence[Path]]:
    """The rows of the files that are not JSON, and the JSON files."""
    plain = _PLAIN if isinstance(source, Texts) else ()
    files = files_of(path, (*plain, *parquet.SUFFIXES, *json_rows.SUFFIXES), key)
    texts = [file for file in files if file.name.endswith(plain)]
    tables = [file for file in files if file.name.endswith(parquet.SUFFIXES)]
    others: list[Rows] = [TextFiles(texts, key)] if texts else []
    if tables:
        others.append(parquet.rows_in(tables, path, key))
    return others, [file for file in files if file not in {*texts, *tables}]
