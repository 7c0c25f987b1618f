"""GSM8K (arXiv 2110.14168): school mathematics in words, without images. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nvlm.data.record import BadRecord
from nvlm.data.sources.rows import Row, Rows
from nvlm.tasks.asked import Asked, text_of
from nvlm.tasks.layouts.parquet import parquet
from nvlm.tasks.release import Release
from nvlm.tasks.rows import json_rows

_CALCULATION = re.compile(r"<<[^<>]*>>")


def of_row(row: Row, name: str, root: Path) -> Asked:
    """A row of either release. The answer is a solution whose last line is "#### NUMBER"."""
    solution = text_of(row, "answer")
    _, mark, number = solution.rpartition("####")
    if not mark:
        raise BadRecord("`answer` has no line `#### NUMBER`")
    shown = _CALCULATION.sub("", solution)  # which a calculator would have filled in
    return Asked(id=name, text=text_of(row, "question"), references=(number.strip(),), shown=shown)


def _open(files: Sequence[Sequence[Path]], key: str) -> Rows:
    return json_rows(files[0], key)


RELEASES = (
    Release(
        files=(("{split}.jsonl", "data/{split}.jsonl", "grade_school_math/data/{split}.jsonl"),),
        rows=_open,
        ask=of_row,
    ),
    parquet(of_row, "main/"),
)
