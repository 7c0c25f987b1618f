"""A question of a task, ready to be asked. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nvlm.data.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`record`: the messages up to the question, and their images. `shown`: the answer where the question is a few-shot
    example; empty: its most frequent reference. The other fields are those of a Line (nvlm.metrics.line); `options` and
    `type` are empty if the metric needs none, and scores are broken down by `category`."""

    record: Record
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    type: str = ""
    category: str = ""
    shown: str = ""


class Questions(Protocol):
    """A task's questions, in a fixed order. Reading a bad one raises BadRecord, in particular NoAnswer if it has no
    reference."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Question: ...
    def name(self, index: int) -> str:
        """The question's id, also if it cannot be read."""
        ...
