"""The questions of a benchmark's files, read one at a time, and checks of the files beforehand. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nvlm.config.task import TaskConfig
from nvlm.config.values import problem
from nvlm.data.record import BadRecord, one_record
from nvlm.data.sources.rows import Rows
from nvlm.tasks.asked import Asked, all_images, named, question_of
from nvlm.tasks.question import Question
from nvlm.tasks.release import KEY, Found
from nvlm.tasks.rows import as_row

_FIRST = 5  # questions that are read before an evaluation starts
_MOST = 20_000  # questions whose images are looked up before it starts, evenly spaced


@dataclass(frozen=True, slots=True, eq=False)
class FileQuestions:
    """The questions of `task` in the files `found` (as nvlm.tasks.question.Questions)."""

    task: TaskConfig
    found: Found
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Question:
        return question_of(self.asked(index), self.task)

    def asked(self, index: int) -> Asked:
        """What the row asks. Raises BadRecord."""
        return self.found.release.ask(as_row(self.rows[index]), self.rows.name(index), self.found.root)

    def name(self, index: int) -> str:
        """The name of the question's row."""
        return self.rows.name(index)


def check(questions: FileQuestions) -> None:
    """Raise ConfigError if there are no questions, if images are missing, or if none of the first can be asked."""
    if not len(questions):
        raise problem(KEY, f"{questions.found.files[0][0]}, which has no rows", "questions", f"{KEY}=FOLDER")
    if questions.found.release.images:
        _check_images(questions)
    name, split, count = questions.task.name, questions.task.split, min(_FIRST, len(questions))
    reasons = [_reason(questions, index) for index in range(count)]
    if all(reasons):
        got = f"{name}, of whose first {count} questions none can be asked ({questions.name(0)}: {reasons[0]})"
        raise problem(KEY, got, f"the published files of split {split}", "download them again")


def _reason(questions: FileQuestions, index: int) -> str | None:
    """Why the question cannot be asked, or None if it can."""
    try:
        with one_record():
            question_of(questions.asked(index), questions.task)
    except BadRecord as error:
        return str(error)
    return None


def _check_images(questions: FileQuestions) -> None:
    missing = _missing(questions)
    if missing:
        shown = ", ".join(map(named, missing[:3])) + (", ..." if missing[3:] else "")
        count = "1 image" if len(missing) == 1 else f"{len(missing)} images"
        got = f"{questions.found.root}, where {count} of {questions.task.name} cannot be found: {shown}"
        raise problem(
            KEY, got, "the images of all questions", f"unpack the images of {questions.task.name} there again"
        )


def _missing(questions: FileQuestions) -> list[Path]:
    """The missing image files of at most `_MOST` questions, by listing each folder of images once."""
    wanted: dict[Path, None] = {}
    for index in range(0, len(questions), -(-len(questions) // _MOST)):
        try:
            with one_record():
                images = [image for image in all_images(questions.asked(index)) if isinstance(image, Path)]
        except BadRecord:
            continue  # it is counted as unreadable when it is asked
        wanted |= dict.fromkeys(images)
    names = {folder: _names(folder) for folder in {path.parent for path in wanted}}
    return [path for path in wanted if path.name not in names[path.parent]]


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()
