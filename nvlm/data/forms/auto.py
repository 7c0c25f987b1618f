"""The form of a row, by its keys or by what its source says. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvlm.config.data import Documents, FileSource, Obelics, TaskFiles, Texts
from nvlm.data.forms import dialogue, mmc4, obelics, text
from nvlm.data.forms.tasks import task_form
from nvlm.data.parts import says
from nvlm.data.record import Record
from nvlm.data.sources.rows import Form


def read(row: Any, name: str, root: Path) -> Record:
    """The record of a row: a document if it has a `text` but no turns, else a conversation. Raises BadRecord."""
    return (text if _is_text(row) else dialogue).read(row, name, root)


def _is_text(row: Any) -> bool:
    if not isinstance(row, Mapping) or not isinstance(row.get("text"), str) or not row["text"]:
        return False
    return not any(says(row.get(key)) for key in dialogue.TURNS)


def form_of(source: FileSource, seed: int = 0) -> Form:
    """The form of the rows of `source`. `seed`: draws what a form leaves open."""
    if isinstance(source, Texts):
        return text.read
    if isinstance(source, Documents):
        form = obelics if isinstance(source, Obelics) else mmc4
        return functools.partial(form.read, most_images=source.most_images)
    task = source.task if isinstance(source, TaskFiles) else None
    return task_form(task, seed) if task else read


def draws(source: FileSource) -> bool:
    """Whether the form of the rows of `source` depends on the seed."""
    return isinstance(source, TaskFiles) and source.task is not None
