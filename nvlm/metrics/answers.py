"""Reads answer files: one JSON object a line, with an id, an answer and references. Imports no torch."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nvlm.config.values import ConfigError, problem
from nvlm.metrics.line import Line
from nvlm.metrics.needs import lacking

LONGEST = 16 << 20  # bytes of a line
FORM = '{"id": "1", "answer": "two", "references": ["two", "2"]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The lines of an answer file; `cut`: the number of the last one, if it breaks off and was left out."""

    path: Path
    lines: tuple[Line, ...]
    cut: int | None


def read_answers(path: Path, metric: str) -> Answers:
    """All lines of `path`, with what `metric` needs. Raises ConfigError with the line's number if one cannot be scored,
    OSError if the file cannot be read."""
    if path.is_dir():
        inside = next(iter(sorted(path.glob("*.jsonl"))), "FILE.jsonl")
        raise problem(f"answers={path}", "a folder", "a file of answers", f"answers={inside}")
    found: dict[str, tuple[int, Line]] = {}
    cut = None
    with open(path, "rb") as file:
        for number, text in _numbered(file, path):
            try:
                value = _value(text)
            except (ValueError, RecursionError) as error:
                if not text.endswith(b"\n") and number > 1:
                    cut = number
                    break
                raise _refused(
                    path, number, f"{_start(text.decode(errors='replace').strip())} ({error})", "a JSON object"
                ) from None
            line = _line(value, path, number)
            if line.id in found:
                raise _refused(path, number, f"the id {line.id!r} of line {found[line.id][0]} again", "another id")
            _check(line, metric, path, number)
            found[line.id] = number, line
    if not found:
        raise problem(
            f"answers={path}", "an empty file", f"lines such as {FORM}", "answers=FILE with a file of answers"
        )
    return Answers(path=path, lines=tuple(line for _, line in found.values()), cut=cut)


def _numbered(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    number = 0
    while text := file.readline(LONGEST + 1):
        number += 1
        if len(text) > LONGEST:
            raise _refused(path, number, f"more than {LONGEST >> 20} MiB", "a line of one question")
        if text.strip():
            yield number, text


def _value(text: bytes) -> Any:
    return json.loads(text.decode("utf-8-sig"), parse_constant=_no_number)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _line(value: Any, path: Path, number: int) -> Line:
    place = f"{path}, line {number}"
    if not isinstance(value, dict):
        raise _refused(path, number, f"a JSON {type(value).__name__}", f"an object such as {FORM}")
    for key in ("id", "answer"):
        if key not in value:
            raise problem(place, f"no {key!r}", f"an object such as {FORM}", f'add "{key}": "..." to the line')
    references = value.get("references", [])
    return Line(
        id=_text(place, "id", value["id"]),
        answer=_text(place, "answer", value["answer"]),
        references=_texts(place, "references", references if isinstance(references, list) else [references]),
        options=_texts(place, "options", value.get("options", [])),
        **{key: _text(place, key, value.get(key, "")) for key in ("type", "category", "reason")},
    )


def _texts(place: str, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise problem(f"{place}: {key}", _start(value), "a list of texts", f'"{key}": ["..."]')
    return tuple(_text(place, key, one) for one in value)


def _text(place: str, key: str, value: Any) -> str:
    """A text, or a number as it is written in JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise problem(f"{place}: {key}", _start(value), "a text", f'"{key}": "..." (an empty text if there is none)')


def _check(line: Line, metric: str, path: Path, number: int) -> None:
    lack = None if line.reason else lacking(metric, line)
    if lack:
        raise problem(f"{path}, line {number}: {lack.key}", lack.got, f"{lack.expected}, for {metric}", lack.fix)


def _refused(path: Path, number: int, got: str, expected: str) -> ConfigError:
    fix = f"correct the line, or remove it: sed -i {number}d {shlex.quote(str(path))}"
    return problem(f"{path}, line {number}", got, expected, fix)


def _start(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
