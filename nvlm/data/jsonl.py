"""Records from a file of JSON lines: one {"messages": [...], "images": [...]} per line. Imports no torch."""

from __future__ import annotations

import functools
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nvlm.config.data import Jsonl
from nvlm.config.values import ConfigError, problem
from nvlm.data.images import image_path, open_regular
from nvlm.data.messages import check_row
from nvlm.data.record import BadRecord, First, Record, printable

_LONGEST = 1 << 26  # bytes; the longest line when only the first records are read


def build(source: Jsonl, seed: int, heldout: bool) -> JsonlRecords | None:
    """The records of the source's training or held-out file; None without a held-out file. Raises ConfigError."""
    key, path = _file(source, heldout)
    return JsonlRecords(path, f"data.{key}") if path else None


def first(source: Jsonl, heldout: bool) -> First | None:
    """The records of one of the source's files, of which no more is read than is used."""
    key, path = _file(source, heldout)
    if heldout and not path:
        return None
    check_file(path or "", f"data.{key}")
    return First(f"data.{key}", path or "", _lines(Path(path or ""), f"data.{key}"))


def _file(source: Jsonl, heldout: bool) -> tuple[str, str | None]:
    return ("heldout_path", source.heldout_path) if heldout else ("path", source.path)


def _lines(path: Path, key: str) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Name of each record, and a function that reads it. Blank lines are skipped."""
    root, count = path.resolve().parent, 0
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
            if line.strip():
                count += 1
                name = f"{path.name}:{number}"
                yield name, functools.partial(read_line, line, name, root)
    if not count:
        raise _blank(key, path)


def _blank(key: str, path: str | Path) -> ConfigError:
    return problem(key, f"{path}, which has only blank lines", "one JSON object per line", f"{key}=FILE")


class JsonlRecords:
    """One JSON object per line: `messages`, `images` (paths inside the file's folder), optionally `id`.

    Blank lines are skipped. `key`: the setting that the path came from. Raises ConfigError.
    """

    def __init__(self, path: str, key: str = "data.path") -> None:
        check_file(path, key)
        self.path = Path(path)
        self.root = self.path.resolve().parent
        self.starts, self.lines = self._scan()
        if not len(self.lines):
            raise _blank(key, path)

    def _scan(self) -> tuple[np.ndarray, Sequence[int]]:
        """Offset of each line, and the numbers (from 0) of the lines that are not blank."""
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

    @property
    def files(self) -> Sequence[Path]:
        return [self.path]

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
    """Raise ConfigError if `path`, which the setting `key` names, cannot be a file of JSON lines."""
    lines, fix = "a text file of one JSON object per line", f"{key}=FILE"
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


# Files that may be mistaken for JSON lines: first bytes, name, and what to do.
_OTHER_FILES = (
    (b"\x1f\x8b", "a gzip file", "unpack it: gunzip {path}"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it: unzstd {path}"),
    (b"PK\x03\x04", "a zip file", "unpack it: unzip {path}"),
    (b"PAR1", "a Parquet file", "write its rows as JSON lines"),
    (b"ARROW1", "an Arrow file", "write its rows as JSON lines"),
    (b"[", "a JSON list", "write its elements as lines: jq -c '.[]' {path}"),
)


def read_line(text: bytes, name: str, root: Path) -> Record:
    """The record on one line of a file in the folder `root` (resolved); `name` is its id unless it has one.

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
