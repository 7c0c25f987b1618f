"""One answered question: what a line of an answer file says. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A model's answer and what it is compared with.

    `references`: accepted answers, or one per annotator; `options`: of a multiple-choice question, in order; `type` and
    `category`: what the metric or the table distinguishes, such as "float" or "HME100k".
    """

    id: str
    answer: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    type: str = ""
    category: str = ""
