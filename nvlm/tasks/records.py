"""The held-out records of a data source as questions. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm.data.messages import first_question
from nvlm.data.sources.registry import Records
from nvlm.tasks.question import Question


@dataclass(frozen=True, slots=True)
class RecordQuestions:
    """Each record's first question (as nvlm.tasks.question.Questions).

    Its references are all answers that the record gives, as several people's to a task of `vqa`, or else that turn's.
    """

    records: Records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Question:
        asked, answer = first_question(self.records[index])
        references = asked.answers or (answer,)
        return Question(record=asked, references=references, options=asked.options, category=self.records.kind(index))

    def name(self, index: int) -> str:
        """The record's name."""
        return self.records.name(index)
