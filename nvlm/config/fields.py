"""Limits on fields, given in their declaration: `steps: Annotated[int, Range(1)]`. Needs only the standard library.

`value in limit` says whether a value is allowed, `str(limit)` what is expected, and `limit.instead(value)` suggests a
replacement. nvlm.config.mapping.from_mapping checks every value against the limits of its field.
"""

from __future__ import annotations

import math
import os
import re
from difflib import get_close_matches
from string import Formatter
from typing import Annotated

_LONGEST_NAME = 200  # bytes: file systems allow 255, and the trainer extends some names
SWEEPS = "sweep"  # the folder, next to the runs, that holds sweeps


class Range:
    """Numbers from `least` to `most` inclusive, or strictly `above` and `below` a bound; `also`: one extra value.

    NaN and infinity are never allowed. `example`: the value to suggest, if not a bound.
    """

    def __init__(self, least=None, most=None, *, above=None, below=None, also=None, example=None) -> None:
        self.least, self.most, self.above, self.below = least, most, above, below
        self.also, self.example = also, example

    def __contains__(self, value: float) -> bool:
        inside = (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        return inside or value == self.also

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        told = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
        return told + (f", or {self.also:g}" if self.also is not None else "")

    def instead(self, value: float) -> str:
        """The example if there is one, else the bound nearest to `value`."""
        over = self.most is not None and value > self.most
        bound = self.most if over or self.least is None else self.least
        return str(bound if self.example is None else self.example)


class Choice:
    """One of several words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __contains__(self, value: str) -> bool:
        return value in self.words

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"

    def instead(self, value: str) -> str:
        """The word most similar to `value`."""
        return (get_close_matches(value, self.words, n=1) or self.words)[0]


class Take:
    """Which records of a source are used: all, or first:N, last:N or random:N, where N is a number or a percentage."""

    FORM = re.compile(r"(first|last|random):(\d+(?:\.\d+)?%|[1-9]\d*)")

    def __contains__(self, value: str) -> bool:
        match = self.FORM.fullmatch(value)
        return value == "all" or bool(match) and not (match[2].endswith("%") and not 0 < float(match[2][:-1]) <= 100)

    def __str__(self) -> str:
        return "all, or first:N, last:N or random:N with a number N, or a percentage such as first:10%"

    def instead(self, value: str) -> str:
        """The number in `value`, if it has one."""
        number = re.search(r"[1-9]\d*", value)
        return f"first:{number[0]}" if number else "all"


class Grid:
    """A grid of tiles as COLUMNSxROWS."""

    FORM = re.compile(r"([1-9]\d?)x([1-9]\d?)")

    def __contains__(self, value: str) -> bool:
        return bool(self.FORM.fullmatch(value))

    def __str__(self) -> str:
        return "COLUMNSxROWS in tiles, such as 2x3 (divide a size in px by vision.tile_size)"

    def instead(self, value: str) -> str:
        """A grid that always exists."""
        return "2x2"


class FileName:
    """A name for a file or folder of the run: no path separators, and not hidden."""

    @staticmethod
    def plain(value: str) -> bool:
        """Whether `value` can name a file and a key."""
        return bool(re.fullmatch(r"[\w+-]+", value)) and len(os.fsencode(value)) <= _LONGEST_NAME

    def __contains__(self, value: str) -> bool:
        plain = value and not value.startswith(".") and value.isprintable() and not set("/\\") & set(value)
        return bool(plain) and value != SWEEPS and len(os.fsencode(value)) <= _LONGEST_NAME

    def __str__(self) -> str:
        return (
            f"a folder's name: at most {_LONGEST_NAME} bytes, printable, without a slash, not beginning with a dot, "
            f"and not {SWEEPS}, where sweeps are"
        )

    def instead(self, value: str) -> str:
        """The letters and digits of `value`."""
        kept = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in value).strip("-")
        return kept.encode()[:80].decode(errors="ignore") if kept not in ("", SWEEPS) else "my-run"


class Text:
    """Text in valid UTF-8 that does not contain `without`."""

    def __init__(self, without: str = "") -> None:
        self.without = without

    def __contains__(self, value: str) -> bool:
        return _encodable(value) and not (self.without and self.without in value)

    def __str__(self) -> str:
        return "a text in UTF-8" + (f" without {self.without}" if self.without else "")

    def instead(self, value: str) -> str:
        """`value` without what is not allowed."""
        plain = value.encode(errors="ignore").decode()
        return f"'\"{plain.replace(self.without, '') if self.without else plain}\"'"


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # command-line bytes that are not UTF-8
        return False
    return True


class Prompt(Text):
    """A text with {question}, and perhaps {options}; a brace of its own is written twice."""

    def __contains__(self, value: str) -> bool:
        try:
            parts = list(Formatter().parse(value))
        except ValueError:  # a single brace
            return False
        names = {name for _, name, _, _ in parts} - {None}
        plain = not any(spec or conversion for _, _, spec, conversion in parts)
        return super().__contains__(value) and plain and {"question"} <= names <= {"question", "options"}

    def __str__(self) -> str:
        return "a text with {question}, and perhaps {options}"

    def instead(self, value: str) -> str:
        """The question alone."""
        return "'\"{question}\"'"


class FilePath:
    """The path of a file or folder to be read.

    `needed`: what it must point to, if a run requires it (checked in nvlm.config.rules). `example`: such a path.
    """

    def __init__(self, needed: str = "", example: str = "PATH") -> None:
        self.needed, self.example = needed, example

    def __contains__(self, value: str) -> bool:
        return "\0" not in value

    def __str__(self) -> str:
        return "a path, without a NUL character"

    def instead(self, value: str) -> str:
        """`value` up to the first NUL character."""
        return value.partition("\0")[0]


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(above=0, example=1)]
NotNegative = Annotated[float, Range(0)]
Location = Annotated[str, FilePath()]


class Tag:
    """On a union of dataclasses: the field that distinguishes them; in each it is a Choice of a single word."""

    def __init__(self, key: str) -> None:
        self.key = key


def named(path: object) -> str:
    """A path or a URL for a message; a relative path with the folder that it is relative to."""
    text = str(path)
    return repr(text) + ("" if os.path.isabs(text) or "://" in text else f" in {os.getcwd()}")
