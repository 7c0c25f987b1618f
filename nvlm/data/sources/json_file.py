"""The rows of JSON files: one object per line, or the elements of one list, read one at a time; plain or gzip. Imports
no torch."""

from __future__ import annotations

import functools
import json
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nvlm.config.fields import named
from nvlm.config.values import ConfigError, problem
from nvlm.data.images import open_regular
from nvlm.data.record import BadRecord, printable
from nvlm.data.remote import Remote, place
from nvlm.data.sources.gzipped import plain_file, readable
from nvlm.data.sources.rows import FirstRow

_LONGEST = 1 << 26  # bytes; no more is read for the first records
_BOM = b"\xef\xbb\xbf"
_BLANK = " \t\r\n"
_GAP = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")  # between two elements of a list
_DECODER = json.JSONDecoder()


class JsonFile:
    """The rows of a file. A file that begins with a bracket is one list; in any other, blank lines are skipped.

    `key`: the setting that named the file. Raises ConfigError if there is no object in it.
    """

    def __init__(self, path: str, key: str) -> None:
        check_file(path, key)
        self.path = place(path, key)
        self.plain = plain_file(self.path, key)
        self.is_list = _is_list(self.path, key)
        # Where each object starts and ends, bytes from the file's start; and its line, or its place in the list.
        self.starts, self.ends, self.numbers = (_elements if self.is_list else _lines)(self, key)

    @property
    def files(self) -> Sequence[Path | Remote]:
        """The file itself."""
        return (self.path,)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> object:
        return parsed(self.text(index))

    def name(self, index: int) -> str:
        """FILE:LINE, or FILE[PLACE] in a list, counted from 0."""
        return _name(self.path, self.is_list, self.numbers[index])

    def text(self, index: int) -> bytes:
        """The object as it is in the file."""
        with open_regular(self.plain) as file:
            file.seek(self.starts[index])
            return file.read(self.ends[index] - self.starts[index])


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
        return file.read(1 << 16).removeprefix(_BOM).lstrip(_BLANK.encode()).startswith(b"[")


def _lines(of: JsonFile, key: str) -> tuple[np.ndarray, np.ndarray, Sequence[int]]:
    starts, blank = [0], []
    with open_regular(of.plain) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while starts[-1] < len(data):
            end = data.find(b"\n", starts[-1]) + 1 or len(data)
            if data[starts[-1]] in _BLANK.encode() and not data[starts[-1] : end].strip():
                blank.append(len(starts) - 1)
            starts.append(end)
    bounds = np.array(starts, dtype=np.int64)
    if not blank:  # two views of one array
        return bounds[:-1], bounds[1:], range(1, len(bounds))
    kept = np.delete(np.arange(len(bounds) - 1, dtype=np.int64), blank)
    if not len(kept):
        raise _blank(key, of.path)
    return bounds[kept], bounds[kept + 1], kept + 1


def _elements(of: JsonFile, key: str) -> tuple[np.ndarray, np.ndarray, Sequence[int]]:
    """The whole text is in memory while the elements are found, and no longer."""
    with open_regular(of.plain) as file:
        data = file.read()
    text = _decoded(data, of.path, key)
    spans, at, byte = [], 0, len(_BOM) if data.startswith(_BOM) else 0
    del data
    for start, end in _spans(text, of.path, key):
        byte += _bytes(text, at, start)
        spans.append((byte, byte := byte + _bytes(text, start, end)))
        at = end
    if not spans:
        raise _empty(key, of.path)
    starts, ends = np.array(spans, dtype=np.int64).T
    return starts, ends, range(len(spans))


def _decoded(data: bytes, path: Path | Remote, key: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"{path}, which is not UTF-8 at byte {error.start}"
        raise problem(key, got, "a list of JSON objects in UTF-8", f"{key}=FILE") from None


def _bytes(text: str, start: int, end: int) -> int:
    return end - start if text.isascii() else len(text[start:end].encode())


def _spans(text: str, path: Path | Remote, key: str) -> Iterator[tuple[int, int]]:
    """Where each element of the list `text` starts and ends, characters."""
    at = _GAP.match(text, text.index("[") + 1).end()
    count = 0
    while not text.startswith("]", at):
        try:
            end = _DECODER.scan_once(text, at)[1]
        except (StopIteration, ValueError, RecursionError):
            raise _damaged(key, path, count) from None
        yield at, end
        count += 1
        gap = _GAP.match(text, end)
        at = gap.end()
        if bool(gap[1]) == text.startswith("]", at):  # no comma between elements, or one after the last
            raise _damaged(key, path, count)
    if text[at + 1 :].strip(_BLANK):
        got = f"{path}, with more after the end of its list of {count}"
        raise problem(key, got, "one list of JSON objects", "join the lists: jq -s add FILES")


def _damaged(key: str, path: Path | Remote, count: int) -> ConfigError:
    return problem(
        key, f"{path}, damaged or cut short after {count} elements", "a whole list of JSON objects", "write it again"
    )


def _first_elements(path: Path | Remote, key: str) -> Iterator[tuple[str, bytes]]:
    with readable(path, key) as file:
        data = file.read(_LONGEST)
        whole = not file.read(1)
    text = _decoded(data, path, key) if whole else data.decode("utf-8-sig", errors="ignore")
    spans, count = _spans(text, path, key), 0
    while True:
        try:
            start, end = next(spans)
        except StopIteration:
            break
        except ConfigError:
            if whole:
                raise
            break  # the part that was read ends within an element
        yield _name(path, True, count), text[start:end].encode()
        count += 1
    if not count and whole:
        raise _empty(key, path)
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
        raise _blank(key, path)


def _empty(key: str, path: Path | Remote) -> ConfigError:
    return problem(key, f"{path}, which is an empty list", "one JSON object per record", f"{key}=FILE")


def _blank(key: str, path: str | Path | Remote) -> ConfigError:
    return problem(key, f"{path}, which has only blank lines", "one JSON object per line", f"{key}=FILE")


def check_file(path: str, key: str) -> None:
    """Raise ConfigError if `path`, which the setting `key` names, cannot be a file of JSON objects."""
    lines, fix = "a text file of one JSON object per line, or of one list of them", f"{key}=FILE"
    try:
        with readable(place(path, key), key) as file:
            first = file.read(64)
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
        if first.lstrip(_BLANK.encode() + _BOM).startswith(beginning):
            raise problem(key, f"{path}, {kind}", lines, change.format(path=path))


# Files that may be mistaken for JSON: first bytes, name, and what to do.
_OTHER_FILES = (
    (b"\x1f\x8b", "a gzip file within another", "unpack it once: gunzip {path}"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it: unzstd {path}"),
    (b"PK\x03\x04", "a zip file", "unpack it: unzip {path}"),
    (b"PAR1", "a Parquet file", "write its rows as JSON lines"),
    (b"ARROW1", "an Arrow file", "write its rows as JSON lines"),
)
