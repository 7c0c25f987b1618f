"""Answers kept as they come, so that an evaluation that was stopped goes on where it was.

The folder of an evaluation holds `task.json`, which says what is evaluated, then `answers.R.jsonl` with the answers of
replica R so far, and in the end answers.jsonl and score.json alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm.config.values import problem
from nvlm.evaluate.order import Prompt
from nvlm.evaluate.score import ANSWERS, SCORE, Row, Score, digest, write
from nvlm.runs.files import write_whole
from nvlm.runs.ownership import flat, typed

DEFINITION = "task.json"


@dataclass(frozen=True, slots=True)
class Kept:
    """The answers of one evaluation in `folder`. `definition`: what determines them besides the questions, as plain
    values: the checkpoint by its content, the task, settings of the model's input."""

    folder: Path
    definition: dict[str, Any]

    def begin(self, prompts: Sequence[Prompt]) -> dict[int, Row]:
        """The answers that are there already, by the numbers of their questions. On the first rank alone.

        Raises ConfigError if they are answers of another checkpoint, to other questions or in other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = (self.folder / DEFINITION).is_file()
        if begun:
            self._compare(json.loads((self.folder / DEFINITION).read_text("utf-8")))
        numbers = {prompt.digest: prompt.index for prompt in prompts}
        rows = [row for path in (self.folder / ANSWERS, *_parts(self.folder)) for row in _rows(path)]
        rows = [row for row in rows if "reason" not in row]
        for row in rows:
            if digest(row) not in numbers:
                raise self._other(
                    "question", f"{row['id']}, which this evaluation does not ask", "the same questions or more"
                )
        if not begun:  # at most the result of a run's own evaluation, whose checkpoint is not known by its content
            clear(self.folder)
            write_whole(self.folder / DEFINITION, json.dumps(self.definition, indent=1) + "\n")
            return {}
        return {numbers[digest(row)]: row for row in rows}

    def append(self, replica: int, rows: Iterable[Row]) -> None:
        """Add answers of `replica`. Raises OSError."""
        with open(self.folder / f"answers.{replica}.jsonl", "ab", buffering=0) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    def finish(self, rows: Sequence[Row], score: Score) -> None:
        """Write all answers, in order, and the score. On the first rank alone. Raises OSError."""
        write(self.folder, rows, score)
        for part in _parts(self.folder):
            part.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder in the block. Raises ConfigError if another evaluation holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some file systems have no locks
                self._lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            expected = "one that no other evaluation uses"
            raise problem(str(self.folder), "a folder in use", expected, "out=DIR, or wait for the other") from None

    def _compare(self, found: Mapping[str, Any]) -> None:
        before, now = flat(dict(found)), flat(self.definition)
        for key in dict.fromkeys((*now, *before)):
            if before.get(key) != now.get(key):
                raise self._other(key, f"answers with {typed(before.get(key))}", typed(now.get(key)))

    def _other(self, what: str, got: str, expected: object):
        fix = "out=DIR for a new evaluation, or delete the folder"
        return problem(f"{self.folder}: {what}", got, str(expected), fix)


def clear(folder: Path) -> None:
    """Delete what an evaluation has left in `folder`, so that nothing of it can be taken for a newer one's."""
    for path in (folder / SCORE, folder / ANSWERS, folder / DEFINITION, *_parts(folder)):
        path.unlink(missing_ok=True)


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("answers.[0-9]*.jsonl"))  # answers.scores.jsonl is no part


def _rows(path: Path) -> list[Row]:
    """The rows in `path`. A last line that was cut short is removed; its question is asked again."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
        lines = lines[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["id"], row["answer"]
        except (ValueError, KeyError, TypeError):
            fix = f"sed -i {number}d {shlex.quote(str(path))}, which asks this question again"
            raise problem(f"{path}, line {number}", "a damaged line", "an answer", fix) from None
        rows.append(row)
    return rows
