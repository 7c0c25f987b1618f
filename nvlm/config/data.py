"""Where records come from, and how they become packed rows.

Each source of records has a schema here, its records in a module of nvlm/data, and conf/data/NAME.yaml. By convention
`path` is where its training records lie: a resumed run may find them elsewhere, but with the same content. Keys that
begin with heldout_ do not affect training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from nvlm.config.fields import Choice, Count, FilePath, Location, Natural, Range, Tag, Text

IMAGE_MARK = "<image>"  # where an image stands in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """The built-in task: pages of handwritten digits."""

    source: Annotated[str, Choice("pages")]
    records: Count
    heldout_records: Count
    questions: Annotated[int, Range(1, 12)]  # about each page

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out records."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Jsonl:
    """Files of one JSON object a line."""

    source: Annotated[str, Choice("jsonl")]
    path: Annotated[str, FilePath(needed="a .jsonl file", example="records.jsonl")] | None
    heldout_path: Location | None

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out records."""
        return self.heldout_path is not None


Source = Annotated[Pages | Jsonl, Tag("source")]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """A source of records, whose own keys stand beside these, and how long a packed row may be (tokens)."""

    source: Source
    seq_length: Count  # tokens: the longest sample
    cross_length: Natural  # cross-attended tokens of a row
    row_length: Count  # tokens: rows are filled up to here; a longer sample has a row of its own
    system: Annotated[str, Text(without=IMAGE_MARK)] | None
    tokenize: Annotated[str, Choice("apart", "joined", "vllm")]  # how text and tags become tokens: nvlm.data.chat
    workers: Natural
    max_skipped: Annotated[float, Range(0, 1)]
    max_pixels: Annotated[int, Range(1, example=50_000_000)]
    window: Count  # steps whose records are packed together
