"""MMMU (arXiv 2311.16502): university questions in thirty subjects, with up to seven images. Imports no torch."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from nvlm.data.record import BadRecord
from nvlm.data.sources.rows import Row
from nvlm.tasks.asked import Asked, images_of, text_of, word_of
from nvlm.tasks.layouts.parquet import parquet

_IMAGES = 7


def of_parquet(row: Row, name: str, root: Path) -> Asked:
    """A row of MMMU/MMMU (a folder per subject) or of lmms-lab/MMMU. Its id is SPLIT_SUBJECT_NUMBER."""
    number = text_of(row, "id")
    subject = re.fullmatch(r"[a-z]+_(.+)_\d+", number)
    images = {n: images_of(row, root, f"image_{n}")[0] for n in range(1, _IMAGES + 1) if row.get(f"image_{n}")}
    answers = _listed(text_of(row, "answer"))
    return Asked(
        id=number,
        text=text_of(row, "question"),
        references=() if answers == ("?",) else answers,  # the test split's
        numbered=images,
        options=_listed(row.get("options") or "[]"),
        type=word_of(row, "question_type"),
        category=subject[1].replace("_", " ") if subject else word_of(row, "subfield"),
    )


def _listed(value: object) -> tuple[str, ...]:
    """The texts of a Python list that is written as text, as options and several answers are. Raises BadRecord."""
    if isinstance(value, list):
        return tuple(map(str, value))
    text = str(value).strip()
    if not text.startswith("["):
        return (text,) if text else ()
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise BadRecord(f"{text[:40]!r} is no list of texts")
    return tuple(map(str, found))


RELEASES = (parquet(of_parquet, "*/"),)
