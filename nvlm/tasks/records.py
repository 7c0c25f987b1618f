"""The held-out records of a data source as questions. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm.data.messages import first_question
from nvlm.data.record import Record
from nvlm.data.sources.registry import Records
from nvlm.tasks.question import Question


def question_of(record: Record, category: str = "") -> Question:
    """The record's first question. Its references are all answers that the record gives, as several people's to a task
    of `vqa`, or else that turn's. Raises BadRecord, in particular NoAnswer."""
    asked, answer = first_question(record)
    return Question(record=asked, references=asked.answers or (answer,), options=asked.options, category=category)


@dataclass(frozen=True, slots=True)
class RecordQuestions:
    """Each record's first question (as nvlm.tasks.question.Questions)."""

    records: Records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Question:
        return question_of(self.records[index], self.records.kind(index))

    def name(self, index: int) -> str:
        """The record's name."""
        return self.records.name(index)
