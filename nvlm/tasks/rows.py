"""Rows of benchmarks' files: Parquet, a list within a JSON object, tables in memory. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm.config.values import problem
from nvlm.data.images import open_regular
from nvlm.data.parts import kind_of
from nvlm.data.record import BadRecord
from nvlm.data.sources.gzipped import plain_file
from nvlm.data.sources.json_file import JsonFile
from nvlm.data.sources.json_places import places_under
from nvlm.data.sources.parquet import ParquetFile, new_cache
from nvlm.data.sources.rows import Joined, Row, Rows

_LARGEST = 1 << 30  # bytes of a file that is read whole


def parquet_rows(paths: Sequence[Path], key: str) -> Rows:
    """The rows of Parquet files. Row groups of any size are read: questions are asked nearly in order, and published
    files have groups of 100 rows with their images."""
    cache = new_cache()
    return Joined([ParquetFile(path, key, cache) for path in paths])


def json_rows(paths: Sequence[Path], key: str) -> Rows:
    """The rows of files of JSON lines, or of one JSON list each."""
    return Joined([JsonFile(str(path), key) for path in paths])


def rows_under(path: Path, name: str, key: str) -> JsonFile:
    """The objects in the list that the JSON object in a file has under `name`, read one at a time."""
    return JsonFile(str(path), key, places_under(plain_file(path, key), path, key, name))


def read_json(path: Path, key: str) -> Any:
    """The whole content of a JSON file. Raises ConfigError."""
    try:
        with open_regular(path) as file:
            data = file.read(_LARGEST)
        return json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "damaged or cut short"
        raise problem(key, f"{path}: {reason}", "a whole JSON file", f"{key}=FOLDER") from None


@dataclass(frozen=True, slots=True)
class Listed:
    """Rows in memory, with their names, from `files`."""

    files: Sequence[Path]
    rows: Sequence[Row]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def name(self, index: int) -> str:
        """The row's name."""
        return self.names[index]


@dataclass(frozen=True, slots=True)
class With:
    """`rows`, each with the further values `more`, such as what the name of their file says."""

    rows: Rows
    more: Mapping[str, Any]

    @property
    def files(self) -> Sequence[Path]:
        """The files of the rows."""
        return self.rows.files

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return {**as_row(self.rows[index]), **self.more}

    def name(self, index: int) -> str:
        """The row's name."""
        return self.rows.name(index)


def as_row(value: Any) -> Row:
    """`value`, which must be an object. Raises BadRecord."""
    if not isinstance(value, Mapping):
        raise BadRecord(f"{kind_of(value)}, expected an object")
    return value
