"""Records from a sequence in memory, for Python users: anything with __len__ and __getitem__. Imports no torch."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvlm.data.forms import auto
from nvlm.data.record import Record
from nvlm.data.sources.rows import Form, RowRecords


def records(sequence: Sequence[Any], root: str | os.PathLike[str] = ".", form: Form = auto.read) -> RowRecords:
    """The records of a sequence of rows, as docs/data.md describes them, or of values of `Record`.

    Images may be paths below `root`, bytes of files, or PIL images. A row is named by its place, as in [7]. With loader
    workers, each has a copy of the sequence.
    """
    return RowRecords(_Rows(sequence), functools.partial(_record, form), Path(root).resolve())


class _Rows:
    """The items of a sequence."""

    files = ()

    def __init__(self, sequence: Sequence[Any]) -> None:
        self.sequence = sequence

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, index: int) -> Any:
        return self.sequence[index]

    def name(self, index: int) -> str:
        return f"[{index}]"


def _record(form: Form, row: Any, name: str, root: Path) -> Record:
    return row if isinstance(row, Record) else form(row, name, root)
