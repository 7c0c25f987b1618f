"""Files that a kill at any moment leaves whole."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace `path` by `text` at once: a reader sees the old or the new, never a part. Raises OSError, and then leaves
    nothing but the old."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with open(aside, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
