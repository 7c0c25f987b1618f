"""Atomic writes: a kill at any moment leaves no partial file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace the content of `path` by `text` atomically: readers see the old or the new content, never a part. If it
    raises OSError, the old content remains."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
