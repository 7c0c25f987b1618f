"""The rows of JSON files: one object per line, or the elements of one list, read one at a time; plain or gzip. Imports
no torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nvlm.config.fields import named
from nvlm.config.values import ConfigError, problem
from nvlm.data.images import open_regular
from nvlm.data.record import BadRecord, printable
from nvlm.data.remote import Remote, place
from nvlm.data.sources.gzipped import plain_file, readable
from nvlm.data.sources.json_places import BLANK, BOM, Places, blocks, decoded, no_elements, only_blank, places, spans
from nvlm.data.sources.rows import FirstRow

_LARGEST = 1 << 28  # bytes of a row, with images as base64 text
_LONGEST = 1 << 26  # bytes; no more is read for the first records


class JsonFile:
    """The rows of a file. A file that begins with a bracket is one list; in any other, blank lines are skipped.

    `key`: the setting that named the file; `found`: where its rows are, if that is known, so that they need not be
    looked for. Raises ConfigError if there is no object in it.
    """

    def __init__(self, path: str, key: str, found: Places | None = None) -> None:
        check_file(path, key)
        self.path = place(path, key)
        self.plain = plain_file(self.path, key)
        self.is_list = _is_list(self.path, key)
        self.places = found or places(self.plain, self.path, key, self.is_list)

    @property
    def files(self) -> Sequence[Path | Remote]:
        """The file itself."""
        return (self.path,)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> object:
        return parsed(self.text(index))

    def name(self, index: int) -> str:
        """FILE:LINE, or FILE[PLACE] in a list, counted from 0."""
        return _name(self.path, self.is_list, self.places[index][2])

    def text(self, index: int) -> bytes:
        """The object as it is in the file. Raises BadRecord if it is too large."""
        start, size, _ = self.places[index]
        if size > _LARGEST:
            raise BadRecord(f"{size >> 20} MiB of JSON, more than {_LARGEST >> 20}")
        with open_regular(self.plain) as file:
            file.seek(start)
            return file.read(size)


def find_places(path: str, key: str) -> Iterator[np.ndarray]:
    """The PLACE of each row of the file `path`, some at a time, in memory that does not grow with its lines."""
    check_file(path, key)
    file = place(path, key)
    return blocks(plain_file(file, key), file, key, _is_list(file, key))


def parsed(text: bytes) -> object:
    """The value that `text` holds. Raises BadRecord."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRecord(f"not JSON: {error}") from None
    except RecursionError:
        raise BadRecord("not JSON that can be read: nested too deeply") from None


def first_rows(path: str, key: str) -> Iterator[FirstRow]:
    """The first rows of a file, of which no more is read than is needed. Raises ConfigError."""
    check_file(path, key)
    file = place(path, key)
    texts = _first_elements(file, key) if _is_list(file, key) else _first_lines(file, key)
    return ((name, functools.partial(parsed, text)) for name, text in texts)


def _name(path: Path | Remote, is_list: bool, number: int) -> str:
    return f"{path.name}[{number}]" if is_list else f"{path.name}:{number}"


def _is_list(path: Path | Remote, key: str) -> bool:
    with readable(path, key) as file:
        return file.read(1 << 16).removeprefix(BOM).lstrip(BLANK.encode()).startswith(b"[")


def _first_elements(path: Path | Remote, key: str) -> Iterator[tuple[str, bytes]]:
    with readable(path, key) as file:
        data = file.read(_LONGEST)
        whole = not file.read(1)
    text = decoded(data, path, key) if whole else data.decode("utf-8-sig", errors="ignore")
    found, count = spans(text, path, key), 0
    while True:
        try:
            start, end = next(found)
        except StopIteration:
            break
        except ConfigError:
            if whole:
                raise
            break  # the part that was read ends within an element
        yield _name(path, True, count), text[start:end].encode()
        count += 1
    if not count and whole:
        raise no_elements(key, path)
    if not count:
        got = f"{path}, whose first object does not end within {_LONGEST >> 20} MiB"
        raise problem(key, got, "a list of JSON objects", f"{key}=FILE")


def _first_lines(path: Path | Remote, key: str) -> Iterator[tuple[str, bytes]]:
    count = 0
    with readable(path, key) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
            if line.strip():
                count += 1
                yield _name(path, False, number), line
    if not count:
        raise only_blank(key, path)


def check_file(path: str, key: str) -> None:
    """Raise ConfigError if `path`, which the setting `key` names, cannot be a file of JSON objects."""
    lines, fix = "a text file of one JSON object per line, or of one list of them", f"{key}=FILE"
    try:
        with readable(place(path, key), key) as file:
            first = file.read(512)
    except FileNotFoundError:
        raise problem(key, named(path), "a .jsonl or .json file that exists", fix) from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise problem(key, f"{printable(repr(path))}: {printable(str(reason))}", lines, fix) from None
    if not first:
        raise problem(key, f"{path}, which is empty", lines, fix)
    for beginning, kind, change in _OTHER_FILES:
        if first.lstrip(BLANK.encode() + BOM).startswith(beginning):
            raise problem(key, f"{path}, {kind}", lines, change.format(path=path))
    for offset, mark, kind, source in _OTHER_SOURCES:
        if first.startswith(mark, offset):
            section, _, _ = key.rpartition(".")
            fix = f"data={source}" if section == "data" else f"{section}.source={source}"
            raise problem(key, f"{path}, {kind}", lines, f"{fix}, which reads such files")


# Files that may be mistaken for JSON: first bytes, name, and what to do.
_OTHER_FILES = (
    (b"\x1f\x8b", "a gzip file within another", "unpack it once: gunzip {path}"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it: unzstd {path}"),
    (b"PK\x03\x04", "a zip file", "unpack it: unzip {path}"),
    (b"ARROW1", "an Arrow file", "write its rows as JSON lines"),
)
# Files that another source reads: the place of some bytes, these bytes, name, and source.
_OTHER_SOURCES = (
    (0, b"PAR1", "a Parquet file", "parquet"),
    (257, b"ustar", "a tar file", "webdataset"),
)
