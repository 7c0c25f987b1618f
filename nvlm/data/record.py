"""A record as read from disk, and the exceptions for records that cannot be used. Imports no torch."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nvlm.config.values import ConfigError

_LONGEST = 300  # characters of a reason


class BadRecord(ValueError):
    """A record that cannot be used; the message is the reason for skipped.jsonl."""


class TooLong(BadRecord):
    """A record whose text or images do not fit the sequence, or whose tiles do not fit the cross-attended keys."""


class ImageChanged(BadRecord):
    """A record whose images are no longer those for which tiles were planned."""


class DataChanged(ValueError):
    """Records or images are no longer as they were when their step was planned. This ends the run."""


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation as read: messages of {role, content}, and its images and videos in order, not yet decoded.

    For evaluation alone: `answers`, all that are accepted for its question, if there are several; `options`, in order,
    of a multiple-choice question.
    """

    id: str
    messages: list[dict[str, Any]]
    images: list[Any]
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class First:
    """The first records of a source: the name of each and a function that reads it, which may raise BadRecord. `key`:
    the setting that names the source; `place`: its value; `fix`: what to do if none of them can be used."""

    key: str
    place: str
    records: Iterator[tuple[str, Callable[[], Record]]]
    fix: str


def identity_of(row: Mapping[str, Any], name: str) -> str:
    """A record's own id, or `name` if it has none."""
    given = row.get("id")
    if given is None:
        return name
    return printable(reprlib.repr(given) if isinstance(given, list | tuple | dict) else str(given))


@contextmanager
def one_record() -> Iterator[None]:
    """Turns any error about the one record that is read, decoded or tokenised in the block into BadRecord.

    Readers and decoders of untrusted input may raise exceptions of any type. AssertionError (our own mistake),
    MemoryError (the machine's) and ConfigError (the user's) pass.
    """
    try:
        yield
    except (AssertionError, ConfigError, MemoryError):
        raise
    except BadRecord as error:
        raise type(error)(printable(str(error))) from error
    except Exception as error:
        raise BadRecord(printable(f"{type(error).__name__}: {error}")) from error


def printable(text: str) -> str:
    """`text` as one line of limited length that any console or file can show."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
