"""Parquet files as on the Hugging Face hub: a folder of numbered parts of each split. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nvlm.data.sources.rows import Row, Rows
from nvlm.tasks.asked import Asked
from nvlm.tasks.release import Release
from nvlm.tasks.rows import parquet_rows


def parquet(ask: Callable[[Row, str, Path], Asked], *folders: str) -> Release:
    """The release in data/SPLIT-00000-of-00001.parquet or the like; `folders`: others in which the files may be."""
    places = (*folders, "data/", "")
    names = ("{split}-*.parquet", "{short}-*.parquet", "{split}.parquet")
    patterns = [f"{place}{name}" for name in names for place in places]
    return Release(files=(tuple(patterns),), rows=_open, ask=ask)


def _open(files: Sequence[Sequence[Path]], key: str) -> Rows:
    return parquet_rows(files[0], key)
