"""Records from a JSON file: {"messages": [...], "images": [...]} per line, or in one list. Imports no torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nvlm.config.data import Jsonl
from nvlm.data.images import image_path
from nvlm.data.json_file import JsonFile, first_texts
from nvlm.data.messages import check_row
from nvlm.data.parts import images_in_parts
from nvlm.data.record import BadRecord, First, Record, printable

ReadRecord = Callable[[bytes, str, Path], Record]
"""(the text of a JSON object, its name, the folder of its images, resolved) -> its record. Raises BadRecord."""


def parsed(text: bytes) -> object:
    """The value that `text` holds. Raises BadRecord."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRecord(f"not JSON: {error}") from None


def identity_of(row: dict, name: str) -> str:
    """The record's own id, or `name` if it has none."""
    given = row.get("id")
    return name if given is None else printable(str(given))


def read_line(text: bytes, name: str, root: Path) -> Record:
    """The record {"messages": [...], "images": [...]}; `name` is its id unless it has one. Raises BadRecord."""
    row = parsed(text)
    check_row(row)
    images = row_images(row)
    found = [image if isinstance(image, bytes) else image_path(root, image) for image in images]
    return Record(identity_of(row, name), row["messages"], found)


def row_images(row: dict) -> list:
    """The images of a row: those that the parts of its messages name, or its list. Raises BadRecord."""
    listed, named = row.get("images") or [], images_in_parts(row["messages"])
    if not isinstance(listed, list):
        raise BadRecord("images is not a list")
    if listed and named:
        raise BadRecord(f"{len(named)} images in parts of messages and {len(listed)} in `images`: expected one of both")
    return named or listed


def build(source: Jsonl, seed: int, heldout: bool) -> JsonRecords | None:
    """The records of the source's training or held-out file; None without a held-out file. Raises ConfigError."""
    key, path = place(source, heldout)
    return JsonRecords(path, f"data.{key}", root=source.root) if path else None


def first(source: Jsonl, heldout: bool) -> First | None:
    """The first records of one of the source's files, of which no more is read than is used."""
    return first_of(*place(source, heldout), root=source.root)


def place(source, heldout: bool) -> tuple[str, str | None]:
    """Which key of a source names its training or held-out file, and its value."""
    return ("heldout_path", source.heldout_path) if heldout else ("path", source.path)


class JsonRecords:
    """The records of a JSON file. `root`: the folder of their images; None: the file's own. `key`: the setting that
    names the file. Raises ConfigError."""

    def __init__(self, path: str, key: str = "data.path", read: ReadRecord = read_line, root: str | None = None):
        self.file, self.read, self.root = JsonFile(path, key), read, image_root(path, root)

    @property
    def files(self) -> Sequence[Path]:
        return [self.file.path]

    def __len__(self) -> int:
        return len(self.file)

    def name(self, index: int) -> str:
        return self.file.name(index)

    def kind(self, index: int) -> str:
        return "all"

    def __getitem__(self, index: int) -> Record:
        return self.read(self.file.text(index), self.name(index), self.root)


def first_of(key: str, path: str | None, read: ReadRecord = read_line, root: str | None = None) -> First | None:
    """The first records of the file `path`; None if it is optional and not given."""
    if key.startswith("heldout") and not path:
        return None
    texts, folder = first_texts(path or "", f"data.{key}"), image_root(path or "", root)
    fix = f"repair them, data.{key}=FILE, or data.root=DIR, the folder of the images"
    return First(f"data.{key}", path or "", _unread(texts, read, folder), fix)


def _unread(
    texts: Iterator[tuple[str, bytes]], read: ReadRecord, root: Path
) -> Iterator[tuple[str, Callable[[], Record]]]:
    for name, text in texts:
        yield name, functools.partial(read, text, name, root)


def image_root(path: str, root: str | None) -> Path:
    """The folder that image paths are relative to, and may not leave."""
    return Path(root).resolve() if root else Path(path).resolve().parent
