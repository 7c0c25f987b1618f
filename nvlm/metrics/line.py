"""One answered question: what a line of an answer file says. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A model's answer and what it is compared with.

    `references`: accepted answers, or one per annotator; `options`: of a multiple-choice question, in order; `type` and
    `category`: what the metric or the table distinguishes, such as "integer" or "HME100k"; `reason`: why the question
    could not be asked (such a line scores 0), or empty.
    """

    id: str
    answer: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    type: str = ""
    category: str = ""
    reason: str = ""

    @property
    def letters(self) -> tuple[str, ...]:
        """The options' letters: A, B, ..."""
        return tuple(chr(ord("A") + number) for number in range(len(self.options)))
