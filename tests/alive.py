"""Which processes a test has left behind."""

from __future__ import annotations

import os
from pathlib import Path


def alive(where: Path) -> list[str]:
    """Processes whose working directory is `where`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(where):
                found.append(entry.name)
        except OSError:
            continue
    return found
