"""Where records come from: the embedded pages, or JSON lines on disk. Input is untrusted.

No URL is fetched, no pickle read; an image path stays inside the folder of its records file, and an image's
header is looked at before its pixels are.
"""

from __future__ import annotations

import io
import json
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from nvlm.batch import BadRecord, Record
from nvlm.config import DataConfig, problem


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
    """One JSON object a line: `messages`, `images` (paths below the file's folder), optionally `id`."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise problem("data.path", repr(path), "a .jsonl file that exists", "data.path=FILE")
        if self.path.stat().st_size == 0:
            raise problem("data.path", f"{path}, which is empty", "one JSON object a line", "data.path=FILE")
        self.root = self.path.resolve().parent
        self.starts = self._line_starts()

    def _line_starts(self) -> np.ndarray:
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            ends = [0]
            while (at := data.find(b"\n", ends[-1])) >= 0:
                ends.append(at + 1)
            if ends[-1] < len(data):
                ends.append(len(data))
        return np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def name(self, index: int) -> str:
        return f"{self.path.name}:{index + 1}"

    def kind(self, index: int) -> str:
        return "all"

    def __getitem__(self, index: int) -> Record:
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            line = file.read(self.starts[index + 1] - self.starts[index])
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadRecord(f"not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            raise BadRecord("no list of messages")
        if not all(isinstance(message, dict) for message in row["messages"]):
            raise BadRecord("a message that is not an object")
        images = row.get("images") or []
        if not isinstance(images, list):
            raise BadRecord("images is not a list")
        return Record(str(row.get("id", self.name(index))), row["messages"], [self._inside(i) for i in images])

    def _inside(self, path: Any) -> Path:
        if not isinstance(path, str):
            raise BadRecord(f"image path is {type(path).__name__}, expected text")
        full = (self.root / path).resolve()
        if not full.is_relative_to(self.root):
            raise BadRecord(f"image path leaves the data folder: {path}")
        return full


def image_size(source: bytes | Path | Image.Image, max_pixels: int) -> tuple[int, int]:
    """(width, height) in px from an image's header, without its pixels; BadRecord as in `decode_image`."""
    if isinstance(source, Image.Image):
        return source.size
    with _opened(source, max_pixels) as image:
        return image.size


def decode_image(source: bytes | Path | Image.Image, max_pixels: int) -> Image.Image:
    """A decoded image of at most `max_pixels` px; BadRecord for one that is missing, broken or larger."""
    if isinstance(source, Image.Image):
        return source
    with _opened(source, max_pixels) as image:
        image.load()
        return image.copy() if image.mode == "P" else image


@contextmanager
def _opened(source: bytes | Path, max_pixels: int) -> Iterator[Image.Image]:
    """An image of which the header alone is read; PIL's complaints, also within the block, become BadRecord."""
    name = _name(source)
    try:
        # PIL's own bomb check only warns up to twice its limit.
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > max_pixels:
                raise BadRecord(f"{name}: {image.width} x {image.height} px, more than data.max_pixels={max_pixels}")
            yield image
    except BadRecord:
        raise
    except FileNotFoundError:
        raise BadRecord(f"{name}: no such image") from None
    except Image.DecompressionBombError as error:
        raise BadRecord(f"{name}: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL's ways of saying "not an image" and "truncated"
        raise BadRecord(f"{name}: {error}") from None


def _name(source: bytes | Path) -> str:
    return source.name if isinstance(source, Path) else "embedded image"


def build_records(data: DataConfig, seed: int, heldout: bool = False) -> Records | None:
    """The training or held-out records of `data`; None where a source has no held-out part."""
    if data.source == "jsonl":
        path = data.heldout_path if heldout else data.path
        return JsonlRecords(path) if path else None
    import datasets

    from nvlm.data.pages import build_pages

    datasets.disable_progress_bars()

    split, count, questions = (
        ("heldout", data.heldout_records, 1) if heldout else ("train", data.records, data.questions)
    )
    return DatasetRecords(build_pages(split, count, seed, questions_per_page=questions))


def answers(messages: Sequence[dict[str, Any]]) -> str:
    """The first assistant turn's text: what a held-out question expects."""
    return next((m["content"] for m in messages if m["role"] == "assistant"), "")
