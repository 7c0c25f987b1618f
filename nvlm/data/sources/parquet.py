"""The rows of Parquet files. Imports no torch, and pyarrow only where it is used.

The smallest part of a Parquet file that can be read is a row group, so a row costs the reading of its group. The groups
that were used last are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nvlm.config.data import Parquet
from nvlm.config.values import ConfigError, problem
from nvlm.data.record import BadRecord, First, printable
from nvlm.data.remote import Remote
from nvlm.data.sources.files import check_begins, files_of, image_root
from nvlm.data.sources.recent import Recent
from nvlm.data.sources.rows import Form, Joined, Row, RowRecords, first_records, leading

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Table
    from pyarrow.parquet import FileMetaData

SUFFIXES = (".parquet",)
_KEPT = 512 << 20  # bytes of decoded row groups that a process keeps
_GROUP = 64 << 20  # bytes: larger groups are refused unless all groups can be kept
_OPEN = 16  # files
_BATCH = 64  # rows that are decoded at a time


@dataclass(frozen=True, slots=True)
class Cache:
    """What a process keeps of all files of a source: decoded row groups and open files."""

    groups: Recent
    readers: Recent


def new_cache() -> Cache:
    """An empty cache of the usual size."""
    return Cache(Recent(_KEPT, _bytes), Recent(_OPEN))


def _bytes(table: Table) -> int:
    return table.nbytes


class ParquetFile:
    """The rows of a file as plain Python values. `key`: the setting that named it. Raises ConfigError.

    Only the file's metadata is read at first, and of that only the lengths of the row groups are kept.
    """

    def __init__(self, path: Path | Remote, key: str, cache: Cache) -> None:
        metadata = _metadata(path, key)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self.path, self.cache = path, cache
        self.ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self.largest = max((group.total_byte_size for group in groups), default=0)  # bytes, decompressed
        self.bytes = sum(group.total_byte_size for group in groups)

    @property
    def files(self) -> Sequence[Path | Remote]:
        """The file itself."""
        return (self.path,)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.ends, index, side="right"))
        table = self.cache.groups.get((self.path, number), lambda: self._group(number))
        start = int(self.ends[number - 1]) if number else 0
        return plain_row(table, index - start)

    def name(self, index: int) -> str:
        """FILE[ROW], counted from 0."""
        return f"{self.path.name}[{index}]"

    def _group(self, number: int) -> Table:
        """The decoded row group. Raises BadRecord if it is damaged, or larger than the metadata says."""
        import pyarrow as pa

        found, size = [], 0
        try:
            reader = self.cache.readers.get(self.path, lambda: _opened(self.path))
            for batch in reader.iter_batches(_BATCH, row_groups=[number], use_threads=False):
                found.append(batch)
                size += batch.nbytes
                if size > 2 * _KEPT:
                    raise BadRecord(f"row group {number} takes more than {2 * _KEPT >> 20} MiB")
            return pa.Table.from_batches(found, reader.schema_arrow)
        except (pa.ArrowException, OSError, OverflowError) as error:
            raise BadRecord(f"row group {number} cannot be read: {printable(str(error))}") from None


def plain_row(table: Table | RecordBatch, index: int) -> dict[str, Any]:
    """A row as plain Python values. Raises BadRecord, as for a map with a repeated key."""
    try:
        return table.slice(index, 1).to_pylist(maps_as_pydicts="strict")[0]
    except Exception as error:  # values that Python has no type for, text that is not UTF-8
        raise BadRecord(f"cannot be read: {type(error).__name__}: {printable(str(error))}") from None


def build(source: Parquet, path: str, key: str, form: Form) -> RowRecords:
    """The records of the files that `path` names. Raises ConfigError."""
    return RowRecords(rows_of(path, key), form, image_root(path, source.root, key))


def first(source: Parquet, path: str, key: str, form: Form) -> First:
    """The first records; the metadata of all files is checked."""
    return first_records(key, path, leading(rows_of(path, key)), form, image_root(path, source.root, key))


def rows_of(path: str, key: str) -> Joined:
    """The rows of the files that `path` names. Raises ConfigError."""
    return rows_in(files_of(path, SUFFIXES, key), path, key)


def rows_in(paths: Sequence[Path | Remote], path: str, key: str) -> Joined:
    """The rows of the files `paths`, which `path` names. Raises ConfigError."""
    cache = new_cache()
    files = [ParquetFile(file, key, cache) for file in paths]
    if not any(map(len, files)):
        raise problem(key, f"{path}, which has no rows", "a row per record", f"{key}=FILE.parquet")
    if sum(file.bytes for file in files) > _KEPT:
        for file in files:
            _check_groups(file, key)
    return Joined(files)


def _check_groups(file: ParquetFile, key: str) -> None:
    if file.largest > _GROUP:
        got = (
            f"{file.path} with a row group of {file.largest >> 20} MiB, all of which is read for a row in random order"
        )
        copy = (
            f"import pyarrow.parquet as q; f = q.ParquetFile('{file.path}'); w = q.ParquetWriter('{file.path.name}', "
            "f.schema_arrow); [w.write_batch(b) for b in f.iter_batches(10)]; w.close()"
        )
        fix = f'write it with row_group_size=10, or in another folder: python -c "{copy}"'
        raise problem(key, got, f"row groups of at most {_GROUP >> 20} MiB, or {_KEPT >> 20} MiB in all", fix)


def _opened(path: Path | Remote) -> Any:
    from pyarrow.parquet import ParquetFile as Reader

    if isinstance(path, Remote):
        return Reader(path.native(), pre_buffer=True)  # few requests of large ranges
    return Reader(path, pre_buffer=False)


def _metadata(path: Path | Remote, key: str) -> FileMetaData:
    import pyarrow as pa

    expected, fix = "a Parquet file", f"{key}=FILE.parquet"
    check_begins(path, key, b"PAR1", expected, fix)
    try:
        with _opened(path) as reader:
            reader.schema_arrow  # noqa: B018 (raises for types that cannot be read)
            metadata = reader.metadata
            rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            if sum(rows) != metadata.num_rows or min(rows, default=0) < 0:
                raise OSError(f"{metadata.num_rows} rows, and {sum(rows)} in its row groups")
            return metadata
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is not UTF-8
        raise _damaged(path, key, error, expected, fix) from None


def _damaged(path: Path | Remote, key: str, error: Exception, expected: str, fix: str) -> ConfigError:
    return problem(key, f"{path}, which is damaged or cut short ({printable(str(error))})", expected, fix)
