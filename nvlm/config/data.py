"""Sources of records, and how records are packed into rows.

Each source has a schema here, a module in nvlm/data that reads its records, and conf/data/NAME.yaml. By convention,
`path` is the location of its training records: it may change when a run is resumed, but the content may not. Keys that
start with heldout_ do not affect training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from nvlm.config.fields import Choice, Count, FilePath, Location, Natural, Range, Tag, Text

IMAGE_MARK = "<image>"  # marks the place of an image in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """The built-in task: pages of handwritten digits."""

    source: Annotated[str, Choice("pages")]
    records: Count
    heldout_records: Count
    questions: Annotated[int, Range(1, 12)]  # per page

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out records."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Jsonl:
    """A file of JSON objects with messages, one per line or in one list. `root`: the folder of the images; None: the
    file's own."""

    source: Annotated[str, Choice("jsonl")]
    path: Annotated[str, FilePath(needed="a .jsonl file", example="records.jsonl")] | None
    heldout_path: Location | None
    root: Location | None

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out records."""
        return self.heldout_path is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Llava:
    """A file in LLaVA's format: conversations, in one list or one per line. `root`: the folder of the images; None:
    the file's own."""

    source: Annotated[str, Choice("llava")]
    path: Annotated[str, FilePath(needed="a .json file in LLaVA's format", example="llava.json")] | None
    heldout_path: Location | None
    root: Location | None

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out records."""
        return self.heldout_path is not None


Source = Annotated[Pages | Jsonl | Llava, Tag("source")]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """A source of records, whose keys are at the same level as these, and limits on packed rows."""

    source: Source
    seq_length: Count  # tokens: maximum length of a sample
    cross_length: Natural  # maximum number of cross-attended tokens per row
    row_length: Count  # tokens: rows are filled up to this length; a longer sample gets a row of its own
    system: Annotated[str, Text(without=IMAGE_MARK)] | None
    tokenize: Annotated[str, Choice("apart", "joined", "vllm")]  # how text and tags become tokens: nvlm.data.chat
    workers: Natural
    max_skipped: Annotated[float, Range(0, 1)]
    max_pixels: Annotated[int, Range(1, example=50_000_000)]
    window: Count  # number of steps whose records are packed together
