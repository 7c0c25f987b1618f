"""OCRBench (arXiv 2305.07895): a thousand questions on reading text, from 29 data sets. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvlm.data.images import image_path
from nvlm.data.sources.rows import Row, Rows
from nvlm.tasks.asked import Asked, images_of, text_of, texts_of, word_of
from nvlm.tasks.layouts.parquet import parquet
from nvlm.tasks.release import Release
from nvlm.tasks.rows import json_rows


def of_json(row: Row, name: str, root: Path) -> Asked:
    """A row of OCRBench.json."""
    return _asked(row, name, (image_path(root, text_of(row, "image_path")),))


def of_parquet(row: Row, name: str, root: Path) -> Asked:
    """A row of echo840/OCRBench."""
    return _asked(row, name, images_of(row, root, "image"))


def _asked(row: Row, name: str, images: tuple) -> Asked:
    """The data set is the question's type, because formulas (HME100k) are compared by a rule of their own."""
    return Asked(
        id=name,
        text=text_of(row, "question"),
        references=texts_of(row, "answers", "answer"),
        images=images,
        type=word_of(row, "dataset_name", "dataset"),
        category=word_of(row, "type", "question_type"),
    )


def _open(files: Sequence[Sequence[Path]], key: str) -> Rows:
    return json_rows(files[0], key)


RELEASES = (
    Release(
        files=(("OCRBench.json", "OCRBench/OCRBench.json"),),
        images=("OCRBench_Images", "*/OCRBench_Images", "images"),
        rows=_open,
        ask=of_json,
    ),
    parquet(of_parquet),
)
