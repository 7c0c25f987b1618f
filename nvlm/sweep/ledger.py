"""sweep.json, the state of a sweep: one row for each of its runs. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from nvlm.runs.files import write_whole
from nvlm.runs.sinks import spared

FILE = "sweep.json"
Status = Literal["done", "failed", "running", "waiting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of one run. `folder` is relative to the sweep's; `seconds` count all attempts at the run."""

    folder: str
    overrides: tuple[str, ...] = ()  # command-line words of launch/train.py
    status: Status = "waiting"
    reason: str = ""
    seconds: float = 0.0


def read(where: Path) -> dict[str, Row]:
    """The rows in the sweep folder `where`, by folder; none if there is no file, or none that can be read.

    Without rows, each run is started again, which a finished one answers at once: its checkpoints tell what is done.
    """
    try:
        rows = [_row(values) for values in json.loads((where / FILE).read_text(encoding="utf-8"))["runs"]]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {row.folder: row for row in rows}


def write(where: Path, command: str, rows: Mapping[str, Row]) -> None:
    """Replace the file atomically. `command`: what repeats the sweep. A full disk is reported and does not raise."""
    text = json.dumps({"command": command, "runs": [asdict(row) for row in rows.values()]}, indent=1)
    with spared(str(where / FILE)):
        write_whole(where / FILE, text + "\n")


def _row(values: Mapping) -> Row:
    if values["status"] not in get_args(Status):
        raise ValueError(values["status"])
    return Row(
        folder=str(values["folder"]),
        overrides=tuple(map(str, values["overrides"])),
        status=values["status"],
        reason=str(values["reason"]),
        seconds=float(values["seconds"]),
    )
