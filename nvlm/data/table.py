"""Rows of a fixed type in a file, read one at a time. Imports no torch."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class Table(Sequence):
    """The rows of a file as tuples. Nothing of it is kept in memory: mapped pages would count as the process's own, and
    random rows soon touch all of them. A row costs one system call.

    `part`: the rows that this table shows, by default all. Raises OSError, and ValueError for a file cut short.
    """

    def __init__(self, path: Path, dtype: np.dtype, part: range | None = None) -> None:
        self.path, self.dtype = path, dtype
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.file)
        rows, rest = divmod(os.fstat(self.file).st_size, dtype.itemsize)
        self.part = range(rows) if part is None else part
        if rest or self.part.stop > rows:
            raise ValueError(f"{path} is cut short")

    def __reduce__(self) -> tuple:
        return Table, (self.path, self.dtype, self.part)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple:
        if not 0 <= index < len(self.part):
            raise IndexError(index)
        return self.rows(index, 1)[0].item()

    def rows(self, first: int, count: int) -> np.ndarray:
        """The rows `first` ... `first` + `count` - 1."""
        size = self.dtype.itemsize
        data = os.pread(self.file, count * size, (self.part.start + first) * size)
        if len(data) != count * size:
            raise OSError(f"{self.path} has become shorter")
        return np.frombuffer(data, self.dtype)
