"""Where the model looked for some of its answers, after the last step: RUN/looks/TASK_N.looks.json, for reports."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from nvlm.config.values import Config
from nvlm.data.pack import collate
from nvlm.data.stills import has_videos, still
from nvlm.evaluate.asking import Asked, asked, longest, processor_of
from nvlm.evaluate.score import Row
from nvlm.evaluate.tasks import Task
from nvlm.explain.check import explains
from nvlm.explain.looks import to_mapping
from nvlm.explain.measure import looks_of
from nvlm.generate.decode import continue_rows
from nvlm.generate.generator import Generator
from nvlm.generate.sampling import Sampling
from nvlm.inspect.document import data_url
from nvlm.processes import groups
from nvlm.runs.files import write_whole
from nvlm.runs.sinks import spared
from nvlm.tiling.pixels import to_rgb

_MOST = 3  # answers of a run
_LONGEST = 64  # tokens of an answer
_PICTURE = (256, 14_000)  # the longest side in px, and about the most bytes


def explain_some(model: Generator, task: Task, rows: Mapping[int, Row], run_dir: Path) -> None:
    """Answer some of the questions of `rows` again, and write what the answers read. Of `evaluate.gallery` questions,
    the first with cross-attended tiles; nothing for models that have none and for layouts that are not supported.

    A collective call, in which one replica has work. `rows`: as in nvlm.evaluate.task.Answered.
    """
    if not explains(model.config):
        return
    asked_of = [number for number, row in rows.items() if "reason" not in row][: model.config.evaluate.gallery]
    numbers = groups.from_first_rank(asked_of)
    if groups.data_rank()[0]:
        return
    alone = replace(model, vision=model.vision.within_replica())
    for place, (number, one) in enumerate(islice(_with_keys(alone, task, numbers), _MOST)):
        looks = looks_of(alone, one.sample, _answer(alone, task, one), one.sketch.pictures.plans)
        if groups.is_first_rank():
            pictures = [_picture(image, model.config) for image in one.question.record.images]
            row = rows[number]
            told = {"question": row["question"], "answer": row["answer"], "pictures": pictures}
            path = run_dir / "looks" / f"{task.name}_{place}.looks.json"
            with spared(str(path)):
                path.parent.mkdir(exist_ok=True)
                write_whole(path, json.dumps(to_mapping(looks) | told) + "\n")


def _picture(image: Any, config: Config) -> str:
    return data_url(to_rgb(still(image, config.data.max_pixels, config.video)), *_PICTURE)


def _with_keys(model: Generator, task: Task, numbers: Sequence[int]) -> Iterator[tuple[int, Asked]]:
    processor = processor_of(task, model.config)
    for number in numbers:
        one = asked(task, number, processor)
        if isinstance(one, Asked) and one.sketch.lengths[1] and not has_videos(one.question.record):
            yield number, one


def _answer(model: Generator, task: Task, one: Asked) -> list[int]:
    config, tokenizer = model.config, processor_of(task, model.config).tokenizer
    row = collate([[one.sample]], config.vision.tile_size, config.row_multiple).to(model.device)
    (batch,) = model.vision.encode([row])
    sampling = Sampling(max_new_tokens=min(longest(task, config), _LONGEST))
    (ids,) = continue_rows(model.pipeline, batch, sampling, tokenizer.ends, config.row_multiple)
    return ids
