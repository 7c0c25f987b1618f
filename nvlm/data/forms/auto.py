"""The form of a row by its keys, or by the schema of its source. Imports no torch."""

from __future__ import annotations

from nvlm.config.data import FileSource, TaskFiles
from nvlm.data.forms import dialogue
from nvlm.data.forms.tasks import task_form
from nvlm.data.sources.rows import Form

read = dialogue.read


def form_of(source: FileSource, seed: int = 0) -> Form:
    """The form of the rows of `source`. `seed`: draws what a form leaves open."""
    task = source.task if isinstance(source, TaskFiles) else None
    return task_form(task, seed) if task else read
