"""Where the rows of a JSON file are: the lines that are not blank, or the elements of its one list. No torch."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nvlm.config.values import ConfigError, problem
from nvlm.data.images import open_regular
from nvlm.data.remote import Remote

BOM = b"\xef\xbb\xbf"
BLANK = " \t\r\n"
_BLOCK = 1 << 20  # bytes that are searched for the ends of lines at a time
_GAP = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")  # between two elements of a list
_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
PLACE = np.dtype([("start", "<u8"), ("size", "<u4"), ("number", "<u4")])
"""Where a row starts and how long it is, bytes; and its line, or its place in the list."""
Places = Sequence[tuple[int, int, int]]
"""The PLACE of each row of a file."""


@dataclass(frozen=True, slots=True, eq=False)
class Spans(Sequence):
    """Places in memory. `starts`, `ends`: bytes; for consecutive lines, two views of one array."""

    starts: np.ndarray
    ends: np.ndarray
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        start = int(self.starts[index])
        return start, int(self.ends[index]) - start, int(self.numbers[index])


def places(plain: Path, path: Path | Remote, key: str, is_list: bool) -> Spans:
    """The places of all rows of `plain`, which holds what the file `path` does, unpacked. `key`: the setting that named
    it. Raises ConfigError if there is none, or if a list is damaged."""
    if is_list:
        return Spans(*_elements(plain, path, key, spans))
    found, blank = [np.zeros(1, dtype=np.int64)], []
    for _, ends, numbers, empty in _lines(plain):
        found.append(ends)
        blank.append(numbers[empty] - 1)
    bounds, skipped = np.concatenate(found), np.concatenate(blank)
    if not len(skipped):
        return Spans(bounds[:-1], bounds[1:], range(1, len(bounds)))
    kept = np.delete(np.arange(len(bounds) - 1, dtype=np.int64), skipped)
    if not len(kept):
        raise only_blank(key, path)
    return Spans(bounds[kept], bounds[kept + 1], kept + 1)


def places_under(plain: Path, path: Path | Remote, key: str, name: str) -> Spans:
    """The places of the objects in the list that a file's one JSON object has under `name`. Raises ConfigError."""
    return Spans(*_elements(plain, path, key, lambda text, *of: _spans_under(text, name, *of)))


def blocks(plain: Path, path: Path | Remote, key: str, is_list: bool) -> Iterator[np.ndarray]:
    """The same places as arrays of PLACE, some lines at a time."""
    count = 0
    parts = ((a[~blank], b[~blank], n[~blank]) for a, b, n, blank in _lines(plain))
    for starts, ends, numbers in [_elements(plain, path, key, spans)] if is_list else parts:
        found = np.empty(len(starts), dtype=PLACE)
        found["start"], found["number"] = starts, numbers
        found["size"] = np.minimum(ends - starts, np.iinfo(np.uint32).max)  # longer ones cannot be read anyway
        count += len(found)
        yield found
    if not count:
        raise only_blank(key, path)


def _lines(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Starts and ends of lines, bytes, their numbers from 1, and whether they are blank: some lines at a time."""
    with open_regular(path) as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    seen, begin, count = np.frombuffer(data, dtype=np.uint8), 0, 0
    for first in range(0, len(seen), _BLOCK):
        ends = np.flatnonzero(seen[first : first + _BLOCK] == ord("\n")) + (first + 1)
        if first + _BLOCK >= len(seen) and (not len(ends) or ends[-1] < len(seen)):
            ends = np.append(ends, len(seen))  # the last line has no end
        starts = np.append(begin, ends)[:-1]
        blank = np.isin(seen[starts], np.frombuffer(BLANK.encode(), dtype=np.uint8))
        for place in np.flatnonzero(blank):  # begins with a blank character
            blank[place] = not data[starts[place] : ends[place]].strip()
        numbers = np.arange(count + 1, count + 1 + len(ends))
        count, begin = count + len(ends), int(ends[-1]) if len(ends) else begin
        yield starts, ends, numbers, blank


def _elements(
    plain: Path, path: Path | Remote, key: str, find: Callable[[str, Path | Remote, str], Iterator[tuple[int, int]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, ends and numbers of a list's elements, which `find` finds in the whole text of the file."""
    with open_regular(plain) as file:
        data = file.read()
    text = decoded(data, path, key)
    found, at, byte = [], 0, len(BOM) if data.startswith(BOM) else 0
    del data
    for start, end in find(text, path, key):
        byte += _bytes(text, at, start)
        found.append((byte, byte := byte + _bytes(text, start, end)))
        at = end
    if not found:
        raise no_elements(key, path)
    starts, ends = np.array(found, dtype=np.int64).T
    return starts, ends, np.arange(len(found))


def decoded(data: bytes, path: Path | Remote, key: str) -> str:
    """`data`, which `path` begins with, as text. Raises ConfigError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"{path}, which is not UTF-8 at byte {error.start}"
        raise problem(key, got, "a list of JSON objects in UTF-8", f"{key}=FILE") from None


def _bytes(text: str, start: int, end: int) -> int:
    return end - start if text.isascii() else len(text[start:end].encode())


def spans(text: str, path: Path | Remote, key: str) -> Iterator[tuple[int, int]]:
    """Where each element of the list `text` starts and ends, characters."""
    count, at = yield from _spans_from(text, text.index("["), path, key)
    if text[at:].strip(BLANK):
        got = f"{path}, with more after the end of its list of {count}"
        raise problem(key, got, "one list of JSON objects", "join the lists: jq -s add FILES")


def _spans_from(text: str, start: int, path: Path | Remote, key: str) -> Generator[tuple[int, int], None, tuple]:
    """The same for the list that starts at `start`; returns how many elements it has and where it ends."""
    at = _GAP.match(text, start + 1).end()
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
    return count, at + 1


def _spans_under(text: str, name: str, path: Path | Remote, key: str) -> Iterator[tuple[int, int]]:
    """The same for the list that the JSON object `text` has under `name`, wherever it stands among the others."""
    begin = next((at for field, at in _fields(text, path, key) if field == name), None)
    if begin is None or not text.startswith("[", begin):
        raise problem(key, f"{path}, without a list `{name}`", f"an object with a list `{name}`", f"{key}=FOLDER")
    yield from _spans_from(text, begin, path, key)


def _fields(text: str, path: Path | Remote, key: str) -> Iterator[tuple[str, int]]:
    """Each key of the JSON object `text`, and where its value begins, which is read only if one more key is asked."""
    at = len(text) - len(text.lstrip(BLANK))
    try:
        while text[at] in "{,":
            name, at = _DECODER.scan_once(text, _BLANKS.match(text, at + 1).end())
            at = _BLANKS.match(text, at).end()
            if text[at] != ":":
                raise ValueError("no colon")
            at = _BLANKS.match(text, at + 1).end()
            yield name, at
            at = _BLANKS.match(text, _DECODER.scan_once(text, at)[1]).end()
        ended = text[at] == "}"
    except (StopIteration, ValueError, IndexError, RecursionError):
        ended = False
    if not ended:
        raise problem(key, f"{path}, damaged or cut short", "a whole JSON object", f"{key}=FOLDER") from None


def _damaged(key: str, path: Path | Remote, count: int) -> ConfigError:
    return problem(
        key, f"{path}, damaged or cut short after {count} elements", "a whole list of JSON objects", "write it again"
    )


def no_elements(key: str, path: Path | Remote) -> ConfigError:
    """The error for an empty list."""
    return problem(key, f"{path}, which is an empty list", "one JSON object per record", f"{key}=FILE")


def only_blank(key: str, path: str | Path | Remote) -> ConfigError:
    """The error for a file without a line that is not blank."""
    return problem(key, f"{path}, which has only blank lines", "one JSON object per line", f"{key}=FILE")
