"""DocVQA (arXiv 2007.00398): questions about pages of documents, with all accepted answers. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from nvlm.data.images import image_path
from nvlm.data.sources.rows import Row, Rows
from nvlm.tasks.asked import Asked, images_of, text_of, texts_of
from nvlm.tasks.layouts.parquet import parquet
from nvlm.tasks.release import Release
from nvlm.tasks.rows import rows_under


def _asked(row: Row, images: tuple) -> Asked:
    """A question of several types, such as "form" and "layout", counts with the first."""
    return Asked(
        id=text_of(row, "questionId"),
        text=text_of(row, "question"),
        references=texts_of(row, "answers"),
        images=images,
        category=next(iter(texts_of(row, "question_types")), ""),
    )


def of_json(row: Row, name: str, root: Path) -> Asked:
    """A row of the challenge's JSON file, whose image is "documents/NAME.png"."""
    return _asked(row, (image_path(root, PurePosixPath(text_of(row, "image")).name),))


def of_parquet(row: Row, name: str, root: Path) -> Asked:
    """A row of lmms-lab/DocVQA."""
    return _asked(row, images_of(row, root, "image"))


def _open(files: Sequence[Sequence[Path]], key: str) -> Rows:
    return rows_under(files[0][0], "data", key)


_NAMES = ("{short}_v1.0_withQT.json", "{short}_v1.0.json")
RELEASES = (
    Release(
        files=(tuple(f"{place}{name}" for place in ("", "{short}/", "spdocvqa_qas/", "qas/") for name in _NAMES),),
        images=("{short}/documents", "documents", "spdocvqa_images", "images"),
        rows=_open,
        ask=of_json,
    ),
    parquet(of_parquet, "DocVQA/"),
)
