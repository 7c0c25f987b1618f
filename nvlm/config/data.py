"""Where records come from, and how they become packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from nvlm.config.fields import Choice, Count, Location, Natural, Range, Text

IMAGE_MARK = "<image>"  # where an image stands in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where records come from and how long a packed row may be (tokens)."""

    source: Annotated[str, Choice("pages", "jsonl")]
    path: Location | None
    heldout_path: Location | None
    records: Count
    heldout_records: Count
    questions: Annotated[int, Range(1, 12)]
    seq_length: Count  # tokens: the longest sample
    cross_length: Natural  # cross-attended tokens of a row
    row_length: Count  # tokens: rows are filled up to here; a longer sample has a row of its own
    system: Annotated[str, Text(without=IMAGE_MARK)] | None
    tokenize: Annotated[str, Choice("apart", "joined", "vllm")]  # how text and tags become tokens: nvlm.data.chat
    workers: Natural
    max_skipped: Annotated[float, Range(0, 1)]
    max_pixels: Annotated[int, Range(1, example=50_000_000)]
    window: Count  # steps whose records are packed together
