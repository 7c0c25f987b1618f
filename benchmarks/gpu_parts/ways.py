"""Processes of benchmarks/gpu_smoke.py: each computes one way and prints its rows. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROW = "ROW "  # what stands before a row of JSON in a log
GRACE = 8.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True, slots=True)
class Way:
    """A process that computes one way, the leader of a process group, and its log."""

    name: str
    process: subprocess.Popen
    log: Path

    @classmethod
    def start(cls, name: str, arguments: Sequence[str], log: Path) -> Way:
        """Start this Python with `arguments`."""
        with log.open("w") as file:
            command = [sys.executable, *arguments]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        return cls(name, process, log)

    def finished(self, end: float) -> tuple[list[dict], str]:
        """Its rows and its log, once it has ended or was stopped at `end` (of time.monotonic())."""
        try:
            self.process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._stop()
        text = self.log.read_text(errors="replace")
        rows = [json.loads(line.removeprefix(ROW)) for line in text.splitlines() if line.startswith(ROW)]
        if self.process.wait() != 0 or not rows:
            error = f"ended with {self.process.returncode}: {last_line(text)[:300]}"
            rows.append({"way": self.name, "right": False, "error": error})
        return rows, text

    def _stop(self) -> None:
        """End the group. It is asked first, so that a run of the command line ends its own workers."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, how)
                self.process.wait(GRACE)
                return


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def verdict(row: Mapping) -> str:
    """A row in one line."""
    word = {True: "right", False: "WRONG", None: "left out"}[row["right"]]
    numbers = [f"{key} {row[key]:.2g}" for key in ("apart", "norm apart", "fall") if row.get(key) is not None]
    numbers += ["other data than the reference's"] if row.get("same data") is False else []
    seconds = row.get("seconds")
    numbers += [f"first step {seconds[0]} s, last {seconds[-1]} s"] if seconds else []
    return f"{word:8} {row['way']:14} {row.get('arch', ''):22} {'  '.join(numbers)} {row.get('error', '')}"[:330]
