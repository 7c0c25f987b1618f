"""VQAv2 (arXiv 1612.00837): open questions about COCO's photographs, ten answers each. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nvlm.data.images import image_path
from nvlm.data.parts import kind_of
from nvlm.data.record import BadRecord
from nvlm.data.sources.rows import Row, Rows
from nvlm.tasks.asked import Asked, images_of, text_of, word_of
from nvlm.tasks.layouts.parquet import parquet
from nvlm.tasks.release import Release
from nvlm.tasks.rows import as_row, rows_under


class Paired:
    """The rows of `questions`, each with what the one of `answers` with the same question_id adds.

    Both files have the same order where they were published. The places of all answers are looked for only if not.
    """

    def __init__(self, questions: Rows, answers: Rows, subset: str) -> None:
        self.questions, self.answers, self.subset = questions, answers, subset

    @property
    def files(self) -> Sequence[Path]:
        """Both files."""
        return (*self.questions.files, *self.answers.files)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Row:
        question = as_row(self.questions[index])
        return {**question, **self._answer(index, question.get("question_id")), "subset": self.subset}

    def name(self, index: int) -> str:
        """The name of the question's row."""
        return self.questions.name(index)

    def _answer(self, index: int, number: Any) -> Mapping[str, Any]:
        if index < len(self.answers) and (found := as_row(self.answers[index])).get("question_id") == number:
            return found
        place = self._places.get(number) if isinstance(number, int) else None
        return as_row(self.answers[place]) if place is not None else {}

    @cached_property
    def _places(self) -> dict[Any, int]:
        return {as_row(self.answers[place]).get("question_id"): place for place in range(len(self.answers))}


def _asked(row: Row, images: tuple) -> Asked:
    answers = row.get("answers") or []
    if not isinstance(answers, list) or not all(isinstance(one, Mapping) for one in answers):
        raise BadRecord(f"`answers` is {kind_of(answers)}, expected a list of objects")
    return Asked(
        id=text_of(row, "question_id"),
        text=text_of(row, "question"),
        references=tuple(text_of(one, "answer") for one in answers),
        images=images,
        category=word_of(row, "answer_type"),
    )


def of_json(row: Row, name: str, root: Path) -> Asked:
    """A question with its annotation; the reader adds the `subset`, such as val2014."""
    number = text_of(row, "image_id")
    return _asked(row, (image_path(root, f"COCO_{row['subset']}_{number:0>12}.jpg"),))


def of_parquet(row: Row, name: str, root: Path) -> Asked:
    """A row of lmms-lab/VQAv2."""
    return _asked(row, images_of(row, root, "image"))


def _open(files: Sequence[Sequence[Path]], key: str) -> Rows:
    (questions,), (answers,) = files
    subset = questions.name.removesuffix("_questions.json").rpartition("_")[2]
    return Paired(rows_under(questions, "questions", key), rows_under(answers, "annotations", key), subset)


RELEASES = (
    Release(
        files=(
            ("v2_OpenEnded_mscoco_{short}2014_questions.json", "*/v2_OpenEnded_mscoco_{short}2014_questions.json"),
            ("v2_mscoco_{short}2014_annotations.json", "*/v2_mscoco_{short}2014_annotations.json"),
        ),
        images=("{short}2014", "*/{short}2014", "*/*/{short}2014"),
        rows=_open,
        ask=of_json,
    ),
    parquet(of_parquet),
)
