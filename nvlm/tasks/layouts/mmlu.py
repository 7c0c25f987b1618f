"""MMLU (arXiv 2009.03300): multiple choice in 57 subjects, without images. Imports no torch."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from nvlm.config.values import problem
from nvlm.data.record import BadRecord
from nvlm.data.sources.rows import Row, Rows
from nvlm.tasks.asked import Asked, letters, text_of, texts_of, word_of
from nvlm.tasks.layouts.parquet import parquet
from nvlm.tasks.release import Release
from nvlm.tasks.rows import Listed


def of_row(row: Row, name: str, root: Path) -> Asked:
    """A row of cais/mmlu, or a line of SUBJECT_SPLIT.csv with the same keys. `answer`: a letter or a place from 0."""
    options, answer = texts_of(row, "choices"), text_of(row, "answer")
    known = letters(len(options))
    right = known[int(answer)] if answer.isdecimal() and int(answer) < len(known) else answer
    if len(right) != 1 or right not in known:
        raise BadRecord(f"answer {answer[:20]!r} is none of {len(options)} options")
    subject = word_of(row, "subject").replace("_", " ")
    return Asked(id=name, text=text_of(row, "question"), references=(right,), options=options, category=subject)


def _open(files: Sequence[Sequence[Path]], key: str) -> Rows:
    found = [(f"{path.name}:{line}", row) for path in files[0] for line, row in enumerate(_lines(path, key), 1)]
    return Listed(files[0], [row for _, row in found], [name for name, _ in found])


def _lines(path: Path, key: str) -> list[Row]:
    """The lines QUESTION,A,B,C,D,ANSWER of a file. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        got = f"{path}, which cannot be read ({type(error).__name__})"
        raise problem(key, got, "a CSV file in UTF-8", f"{key}=FOLDER") from None
    subject = path.stem.rpartition("_")[0]
    return [
        {"question": line[0], "choices": line[1:-1], "answer": line[-1], "subject": subject}
        for line in lines
        if len(line) > 2
    ]


RELEASES = (
    Release(
        files=(("{split}/*_{split}.csv", "data/{split}/*_{split}.csv"),),
        rows=_open,
        ask=of_row,
    ),
    parquet(of_row, "all/", "*/"),
)
