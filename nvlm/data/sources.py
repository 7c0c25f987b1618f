"""Where records come from: the embedded pages, or JSON lines on disk. Imports no torch."""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from nvlm.config.data import DataConfig
from nvlm.config.values import problem
from nvlm.data.images import image_path, open_regular
from nvlm.data.messages import check_row
from nvlm.data.record import BadRecord, Record, printable


class Records(Protocol):
    """A sequence of records; reading a bad one raises BadRecord."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...
    def name(self, index: int) -> str:
        """How skipped.jsonl calls the record."""
        ...

    def kind(self, index: int) -> str:
        """The kind of its first question, for scores by kind."""
        ...


class DatasetRecords:
    """A Hugging Face dataset with columns id, messages and images (kept as encoded bytes until they are used)."""

    def __init__(self, dataset) -> None:
        from datasets import Image as ImageFeature
        from datasets import Sequence as SequenceFeature

        self.dataset = dataset.cast_column("images", SequenceFeature(ImageFeature(decode=False)))

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return str(self.dataset[index]["id"])

    def kind(self, index: int) -> str:
        return self.dataset[index]["kinds"][0]

    def __getitem__(self, index: int) -> Record:
        row = self.dataset[index]
        return Record(str(row["id"]), row["messages"], [image["bytes"] or image["path"] for image in row["images"]])


class JsonlRecords:
    """One JSON object a line: `messages`, `images` (paths below the file's folder), optionally `id`.

    Blank lines are no records. `key`: the setting that named the file. Raises ConfigError.
    """

    def __init__(self, path: str, key: str = "data.path") -> None:
        check_file(path, key)
        self.path = Path(path)
        self.root = self.path.resolve().parent
        self.starts, self.lines = self._scan()
        if not len(self.lines):
            raise problem(key, f"{path}, which holds blank lines alone", "one JSON object a line", f"{key}=FILE")

    def _scan(self) -> tuple[np.ndarray, Sequence[int]]:
        """Where each line starts, and the numbers (from 0) of those that are not blank."""
        starts, blank = [0], []
        with open_regular(self.path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            while starts[-1] < len(data):
                end = data.find(b"\n", starts[-1]) + 1 or len(data)
                if data[starts[-1]] in b" \t\r\n" and not data[starts[-1] : end].strip():
                    blank.append(len(starts) - 1)
                starts.append(end)
        count = len(starts) - 1
        lines = np.delete(np.arange(count, dtype=np.int64), blank) if blank else range(count)
        return np.array(starts, dtype=np.int64), lines

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, index: int) -> str:
        return f"{self.path.name}:{self.lines[index] + 1}"

    def kind(self, index: int) -> str:
        return "all"

    def __getitem__(self, index: int) -> Record:
        line = self.lines[index]
        with open_regular(self.path) as file:
            file.seek(self.starts[line])
            text = file.read(self.starts[line + 1] - self.starts[line])
        return read_line(text, self.name(index), self.root)


def check_file(path: str, key: str) -> None:
    """Raise ConfigError where `path`, which the setting `key` names, cannot be a file of JSON lines."""
    lines, fix = "a text file of one JSON object a line", f"{key}=FILE"
    try:
        with open_regular(Path(path)) as file:
            first = file.read(64)
    except FileNotFoundError:
        missing = repr(path) if Path(path).is_absolute() else f"{path!r} in {Path.cwd()}"
        raise problem(key, missing, "a .jsonl file that exists", fix) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise problem(key, f"{printable(repr(path))}: {printable(str(reason))}", lines, fix) from None
    if not first:
        raise problem(key, f"{path}, which is empty", lines, fix)
    for beginning, kind, change in _OTHER_FILES:
        if first.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(beginning):
            raise problem(key, f"{path}, {kind}", lines, change.format(path=path))


# What else is mistaken for JSON lines: first bytes, name, and what to do.
_OTHER_FILES = (
    (b"\x1f\x8b", "a gzip file", "unpack it: gunzip {path}"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it: unzstd {path}"),
    (b"PK\x03\x04", "a zip file", "unpack it: unzip {path}"),
    (b"PAR1", "a Parquet file", "write its rows as JSON lines"),
    (b"ARROW1", "an Arrow file", "write its rows as JSON lines"),
    (b"[", "a JSON list", "write its elements as lines: jq -c '.[]' {path}"),
)


def read_line(text: bytes, name: str, root: Path) -> Record:
    """The record on one line of a file in the folder `root` (resolved); `name` is its id unless it brings one.

    Raises BadRecord.
    """
    try:
        row = json.loads(text)
    except ValueError as error:
        raise BadRecord(f"not JSON: {error}") from None
    check_row(row)
    images = row.get("images") or []
    if not isinstance(images, list):
        raise BadRecord("images is not a list")
    given = row.get("id")
    identity = name if given is None else printable(str(given))
    return Record(identity, row["messages"], [image_path(root, image) for image in images])


def build_records(data: DataConfig, seed: int, heldout: bool = False) -> Records | None:
    """The training or held-out records of `data`; None where a source has no held-out part."""
    if data.source == "jsonl":
        key, path = ("heldout_path", data.heldout_path) if heldout else ("path", data.path)
        return JsonlRecords(path, f"data.{key}") if path else None
    import datasets

    from nvlm.data.pages import build_pages

    datasets.disable_progress_bars()

    split, count, questions = (
        ("heldout", data.heldout_records, 1) if heldout else ("train", data.records, data.questions)
    )
    return DatasetRecords(build_pages(split, count, seed, questions_per_page=questions))
