"""Rows of a fixed type in a file, read one at a time. Imports no torch."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np


class Table(Sequence):
    """The rows of a file as tuples. Nothing of it is kept in memory: mapped pages would count as the process's own, and
    random rows soon touch all of them. A row costs one system call.

    Raises OSError, and ValueError for a file cut short.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.file)
        count, rest = divmod(os.fstat(self.file).st_size, dtype.itemsize)
        self.count = count
        if rest:
            raise ValueError(f"{path} is cut short")

    def __reduce__(self) -> tuple:
        return Table, (self.path, self.dtype)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.rows(index, 1)[0].item()

    def rows(self, first: int, count: int) -> np.ndarray:
        """The rows `first` ... `first` + `count` - 1."""
        size = self.dtype.itemsize
        data = os.pread(self.file, count * size, first * size)
        if len(data) != count * size:
            raise OSError(f"{self.path} has become shorter")
        return np.frombuffer(data, self.dtype)

    def split(self, counts: Sequence[int]) -> list[TablePart]:
        """The table in consecutive parts with these `counts` of rows. Raises ValueError if it has fewer."""
        ends = list(accumulate(counts))
        return [TablePart(self, range(end - count, end)) for end, count in zip(ends, counts)]


class TablePart(Sequence):
    """Some consecutive rows of a table. All parts of a table share its open file, so there may be any number of them.

    Raises ValueError if the table has fewer rows.
    """

    def __init__(self, table: Table, part: range) -> None:
        if part.stop > len(table):
            raise ValueError(f"{table.path} is cut short")
        self.table, self.part = table, part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple:
        if not 0 <= index < len(self.part):
            raise IndexError(index)
        return self.table[self.part.start + index]
