"""The held-out records of a data source as questions. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm.data.messages import first_question
from nvlm.data.sources.registry import Records
from nvlm.tasks.question import Question


@dataclass(frozen=True, slots=True)
class RecordQuestions:
    """Each record's first question (as nvlm.tasks.question.Questions)."""

    records: Records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Question:
        asked, answer = first_question(self.records[index])
        return Question(record=asked, references=(answer,), category=self.records.kind(index))

    def name(self, index: int) -> str:
        """The record's name."""
        return self.records.name(index)
