"""Rows, the raw mappings of a source, and the records that a form makes of them. Imports no torch."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Protocol

from nvlm.data.record import First, Record

Row = Mapping[str, Any]
Form = Callable[[Any, str, Path], Record]
"""(a row, its name, the folder of its images, resolved) -> its record. Raises BadRecord, also if it is no object."""
FirstRow = tuple[str, Callable[[], Row]]
"""The name of a row and a function that reads it, which may raise BadRecord."""


class Rows(Protocol):
    """A sequence of rows; reading a bad one raises BadRecord."""

    @property
    def files(self) -> Sequence[Path]:
        """The files they are read from."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...
    def name(self, index: int) -> str:
        """The name of the row in skipped.jsonl, such as FILE:LINE."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class RowRecords:
    """The records of `rows`, written in `form`. `root`: the folder of their images, resolved."""

    rows: Rows
    form: Form
    root: Path

    @property
    def files(self) -> Sequence[Path]:
        """The files that the rows are read from."""
        return self.rows.files

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        return self.form(self.rows[index], self.rows.name(index), self.root)

    def name(self, index: int) -> str:
        """The name of the row."""
        return self.rows.name(index)

    def kind(self, index: int) -> str:
        """Rows have no kinds of questions."""
        return "all"


def first_records(key: str, place: str, rows: Iterator[FirstRow], form: Form, root: Path) -> First:
    """The first records of a source. `key`: the setting that names it; `place`: its value."""

    def record(name: str, read: Callable[[], Row]) -> Record:
        return form(read(), name, root)

    found = ((name, functools.partial(record, name, read)) for name, read in rows)
    folder = f"{key.rpartition('.')[0]}.root"  # of the run's only source, or of this one in a blend
    return First(key, place, found, f"repair them, {key}=FILE, or {folder}=DIR, the folder of the images")


def leading(rows: Rows) -> Iterator[FirstRow]:
    """The rows one by one, for sources that find their rows without reading all of them."""
    for index in range(len(rows)):
        yield rows.name(index), functools.partial(rows.__getitem__, index)


class Joined:
    """The rows of several files, one file after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = tuple(parts)
        self.ends = tuple(accumulate(map(len, self.parts)))

    @property
    def files(self) -> Sequence[Path]:
        """The files of all parts."""
        return tuple(chain.from_iterable(part.files for part in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Row:
        number, place = find(self.ends, index)
        return self.parts[number][place]

    def name(self, index: int) -> str:
        """The row's name in its file."""
        number, place = find(self.ends, index)
        return self.parts[number].name(place)


def find(ends: Sequence[int], index: int) -> tuple[int, int]:
    """The number of the part that holds `index`, and the index within it; `ends`: the cumulative sums of their lengths.

    Raises IndexError.
    """
    if not 0 <= index < (ends[-1] if ends else 0):
        raise IndexError(index)
    number = bisect_right(ends, index)
    return number, index - (ends[number - 1] if number else 0)
