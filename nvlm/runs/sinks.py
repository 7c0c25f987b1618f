"""Logging that may fail (full disk, closed pipe) without ending the run. Failures are reported once.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

_MOST = 20_000_000  # bytes kept in memory while the disk is full


def say(text: str) -> None:
    """Print `text` on standard error, if possible."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """An error in a few words."""
    return (isinstance(error, OSError) and error.strerror) or str(error).strip().split("\n")[0] or type(error).__name__


@contextlib.contextmanager
def spared(what: str) -> Iterator[None]:
    """A block that writes `what`: an OSError is reported and otherwise ignored."""
    try:
        yield
    except OSError as error:
        say(f"{what} cannot be written: {reason(error)}")


def json_line(values: Mapping[str, Any]) -> bytes:
    """One line of JSON. NaN and infinities, which JSON lacks, become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return (json.dumps(plain(values), allow_nan=False) + "\n").encode()


class Appended:
    """A file to which pieces are appended whole. Pieces that cannot be written wait in memory, up to _MOST bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: deque[bytes] = deque()
        self.bytes = self.lost = 0
        self.failing = False

    def write(self, piece: bytes = b"") -> None:
        """Append `piece` after the waiting ones."""
        if piece:
            self.waiting.append(piece)
            self.bytes += len(piece)
        try:
            while self.waiting:
                _append(self.path, self.waiting[0])
                self.bytes -= len(self.waiting.popleft())
        except OSError as error:
            self._fail(error)
        else:
            self._recover()

    def close(self) -> None:
        """Try once more, and report what is lost for good."""
        self.write()
        if self.waiting:
            say(f"{self.path}: {len(self.waiting) + self.lost} entries were never written")

    def _fail(self, error: OSError) -> None:
        if not self.failing:
            say(f"{self.path} cannot be written ({reason(error)}): training goes on, new entries wait in memory")
        self.failing = True
        while self.bytes > _MOST:
            self.bytes -= len(self.waiting.popleft())
            self.lost += 1

    def _recover(self) -> None:
        if self.failing:
            say(f"{self.path} can be written again" + (f"; {self.lost} entries were lost" if self.lost else ""))
        self.failing, self.lost = False, 0


def _append(path: Path, piece: bytes) -> None:
    """Append all of `piece` or nothing, even if several processes append at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, io.SEEK_END)
        try:
            written = 0
            while written < len(piece):
                written += file.write(piece[written:])
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


class Steady:
    """A wrapper of the text stream `stream` that reports its first failure on standard error and ignores the others."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._reported = stream, name, False

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act, *arguments) -> None:
        try:
            act(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if isinstance(error, UnicodeError):
                raise
            if isinstance(error, OSError) and error.errno == errno.EPIPE:  # nobody will ever read
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            reported, self._reported = self._reported, True
            if not reported and self is not sys.stderr:
                say(f"{self._name} cannot be written ({reason(error)}): training goes on")


def steady_streams() -> None:
    """Keep prints of this process from raising."""
    for name, title in (("stdout", "standard output"), ("stderr", "standard error")):
        if not isinstance(getattr(sys, name), Steady | type(None)):
            setattr(sys, name, Steady(getattr(sys, name), title))
