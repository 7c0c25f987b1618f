"""The first questions of a task with their pictures, for a run's page."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from nvlm.evaluate.asking import Asked, asked, processor_of
from nvlm.evaluate.report import Shown, draw_pictures
from nvlm.evaluate.score import Row
from nvlm.evaluate.tasks import Task
from nvlm.generate.generator import Generator


def gallery(model: Generator, task: Task, rows: Mapping[int, Row]) -> list[Shown]:
    """The first `evaluate.gallery` of the questions that were asked, with their scored `rows`."""
    processor = processor_of(task, model.config)
    numbers = (number for number, row in rows.items() if "reason" not in row)
    found = []
    for number in islice(numbers, model.config.evaluate.gallery):
        one, row = asked(task, number, processor), rows[number]
        if isinstance(one, Asked):
            pictures = draw_pictures(one.sketch.pictures.plans, one.sample.pixels, processor)
            expected = ", ".join(dict.fromkeys(row["references"]))
            found.append(Shown(row["question"], pictures, row["answer"], expected, row["score"] >= 0.5))
    return found
