"""TextVQA (arXiv 1904.08920): questions about texts in photographs, ten answers each. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvlm.data.images import image_path
from nvlm.data.sources.rows import Row, Rows
from nvlm.tasks.asked import Asked, images_of, text_of, texts_of
from nvlm.tasks.layouts.parquet import parquet
from nvlm.tasks.release import Release
from nvlm.tasks.rows import rows_under


def _asked(row: Row, images: tuple) -> Asked:
    answers = texts_of(row, "answers")
    return Asked(
        id=text_of(row, "question_id"),
        text=text_of(row, "question"),
        references=answers if any(answers) else (),  # the test split's are empty texts
        images=images,
    )


def of_json(row: Row, name: str, root: Path) -> Asked:
    """A row of TextVQA_0.5.1_SPLIT.json."""
    return _asked(row, (image_path(root, f"{text_of(row, 'image_id')}.jpg"),))


def of_parquet(row: Row, name: str, root: Path) -> Asked:
    """A row of lmms-lab/textvqa."""
    return _asked(row, images_of(row, root, "image"))


def _open(files: Sequence[Sequence[Path]], key: str) -> Rows:
    return rows_under(files[0][0], "data", key)


RELEASES = (
    Release(
        files=(("TextVQA_0.5.1_{short}.json",),),
        images=("{short}_images", "train_images", "train_val_images/train_images"),  # validation is in train_images
        rows=_open,
        ask=of_json,
    ),
    parquet(of_parquet),
)
