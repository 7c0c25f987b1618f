"""AI2D (arXiv 1603.07396): multiple choice about diagrams of school science. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from nvlm.data.images import image_path
from nvlm.data.record import BadRecord
from nvlm.data.sources.rows import Row, Rows
from nvlm.tasks.asked import Asked, images_of, letters, text_of, texts_of
from nvlm.tasks.layouts.parquet import parquet
from nvlm.tasks.release import Release
from nvlm.tasks.rows import Listed, as_row, read_json


def of_json(row: Row, name: str, root: Path) -> Asked:
    """A question of questions/IMAGE.json, with its `text` and its `image`.

    Where it asks for a letter in the diagram (`abcLabel`), abc_images/, beside images/, has the diagram with letters in
    place of its labels.
    """
    folder = root.with_name("abc_images").resolve() if row.get("abcLabel") else root
    image = image_path(folder, text_of(row, "image"))
    options = texts_of(row, "answerTexts")
    right = _letter(text_of(row, "correctAnswer"), len(options))
    return Asked(id=name, text=text_of(row, "text"), references=(right,), images=(image,), options=options)


def of_parquet(row: Row, name: str, root: Path) -> Asked:
    """A row of lmms-lab/ai2d, whose answer is the number of the right option."""
    options = texts_of(row, "options")
    right = _letter(text_of(row, "answer"), len(options))
    image = images_of(row, root, "image")
    return Asked(id=name, text=text_of(row, "question"), references=(right,), images=image, options=options)


def _letter(answer: str, count: int) -> str:
    """The right option's letter from its place, counted from 0. Raises BadRecord."""
    if not answer.isdecimal() or not int(answer) < count:
        raise BadRecord(f"answer {answer[:20]!r} is no number of one of {count} options, counted from 0")
    return letters(count)[int(answer)]


def _open(files: Sequence[Sequence[Path]], key: str) -> Rows:
    """All questions about the images that the first kind of file lists; the others are for training."""
    (listed,), questions = files
    chosen = {line.strip() for line in listed.read_text("utf-8", errors="replace").splitlines()}
    kept = [path for path in questions if path.name.partition(".")[0] in chosen]
    found = list(chain.from_iterable(_questions(path, key) for path in kept))
    return Listed((listed, *kept), [row for _, row in found], [name for name, _ in found])


def _questions(path: Path, key: str) -> Iterator[tuple[str, Row]]:
    content = read_json(path, key)
    questions = content.get("questions") if isinstance(content, dict) else None
    for text, question in (questions if isinstance(questions, dict) else {}).items():
        row = {**as_row(question), "text": text, "image": content.get("imageName", path.stem)}
        yield str(row.get("questionId", f"{path.name}:{text}")), row


RELEASES = (
    Release(
        files=(
            ("ai2d_{split}_ids.csv", "*/ai2d_{split}_ids.csv"),
            ("questions/*.json", "*/questions/*.json"),
        ),
        images=("images", "*/images"),
        rows=_open,
        ask=of_json,
    ),
    parquet(of_parquet),
)
