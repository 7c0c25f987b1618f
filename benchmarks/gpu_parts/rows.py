"""Rows of JSON in a file: each on disk the moment it is measured, so that a run that is cut loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table

FACTS = ("device", "torch", "commit")  # the same in all rows of a run
LONG = ("losses", "fp32", "kernels")


def rows_of(out: Path) -> Iterator[dict]:
    """The rows that are there. A line that a kill cut short is none."""
    for line in out.read_text(encoding="utf-8").splitlines() if out.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def tell(out: Path, row: Mapping[str, object]) -> None:
    """Append a row, on disk at once, and print it in short. A line that was cut short before it is ended first."""
    with out.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        torn = size > 0 and file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    print(json.dumps(short(row))[:900], flush=True)


def short(row: Mapping[str, object]) -> dict:
    """A row to read: without what is the same everywhere, four digits, the six longest kernels."""
    kept = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items() if k not in (*FACTS, *LONG)}
    if kernels := row.get("kernels"):
        kept["kernels"] = [f"{ms} {name[:60]}" for name, ms, _ in kernels[:6]]
    return kept


def tables(title: str, rows: Sequence[Mapping[str, object]]) -> Iterator[Table]:
    """A table for each kind of rows: those that have the same columns. Long values are left out."""
    kinds: dict[tuple[str, ...], Table] = {}
    for row in rows:
        kept = {key: value for key, value in row.items() if key not in (*FACTS, *LONG, "cell")}
        if tuple(kept) not in kinds:
            kinds[tuple(kept)] = table = Table(title=title, title_justify="left")
            for heading in kept:
                table.add_column(heading, justify="right", overflow="fold")
        kinds[tuple(kept)].add_row(*map(_text, kept.values()))
    yield from kinds.values()


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
