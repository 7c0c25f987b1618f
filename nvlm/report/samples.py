"""Questions on which the rows of a table disagree most, with their pictures and all answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nvlm.config.tiles import tiling_of
from nvlm.config.values import ConfigError
from nvlm.data.record import BadRecord
from nvlm.data.sources.registry import Records, build_records
from nvlm.data.stills import still
from nvlm.data.video.clip import Video
from nvlm.inspect.document import data_url
from nvlm.report.answers import Answer
from nvlm.report.cells import Grid
from nvlm.report.runs import Run
from nvlm.tiling.tags import tile_tags

_MOST_NAMES = 100_000  # records whose names are searched for a question
_SIDE, _BYTES = 420, 28_000  # px and bytes of a picture
_PICTURES = 2  # of a question


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as a data URL, with the tile grid that is drawn on it and the tag of each tile. `size`: px."""

    url: str
    size: tuple[int, int]
    columns: int
    rows: int
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """A question and its answers by (row, column), of runs with the seed `seed`."""

    id: str
    seed: int
    question: str
    references: tuple[str, ...]
    category: str
    tiles: int | None
    answers: Mapping[tuple[str, str], Answer]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The samples, the tag style drawn on their pictures, and why there are no pictures, if so."""

    samples: tuple[Sample, ...]
    style: str
    missing: str


def samples(grid: Grid, task: str, most: int) -> Chosen:
    """At most `most` questions of `task` on which rows disagree, from the seed that most cells share."""
    by_seed: dict[int, dict[tuple[str, str], Run]] = defaultdict(dict)
    for cell in grid.cells:
        for run in cell.runs:
            if run.last(task):
                by_seed[run.config.seed][cell.row, cell.column] = run
    if not by_seed or not most:
        return Chosen((), "", "")
    seed, runs = max(by_seed.items(), key=lambda item: (len(item[1]), -item[0]))
    answers = {place: run.last(task).answers for place, run in runs.items()}
    names = disagreeing(answers, most)
    shown_by = max(runs.values(), key=lambda run: (run.config.tiling.max_tiles, run.config.tiling.tag == "1d"))
    records, missing = _records(shown_by, task)
    places = _places(records, names) if records else {}
    found = tuple(_sample(name, seed, answers, _pictures(records, places.get(name), shown_by)) for name in names)
    return Chosen(found, shown_by.config.tiling.tag, missing)


def disagreeing(answers: Mapping[tuple[str, str], Mapping[str, Answer]], most: int) -> list[str]:
    """Questions that all cells answered, those first on which the rows' mean scores differ most; categories take turns.
    Questions on which all cells agree are left out."""
    common = set.intersection(*(set(one) for one in answers.values()))
    spread = {name: _spread({place: one[name].score for place, one in answers.items()}) for name in common}
    first = next(iter(answers.values()))
    by_category: dict[str, list[str]] = defaultdict(list)
    for name in sorted(
        (name for name in common if any(spread[name])), key=lambda name: (*(-s for s in spread[name]), name)
    ):
        by_category[first[name].category].append(name)
    turns = [(place, spread[name], name) for names in by_category.values() for place, name in enumerate(names)]
    turns.sort(key=lambda turn: (turn[0], *(-one for one in turn[1]), turn[2]))
    return [name for _, _, name in turns[:most]]


def _spread(scores: Mapping[tuple[str, str], float]) -> tuple[float, float]:
    """The standard deviations of the rows' means and of all scores."""
    rows: dict[str, list[float]] = defaultdict(list)
    for (row, _), score in scores.items():
        rows[row].append(score)
    return float(np.std([np.mean(one) for one in rows.values()])), float(np.std(list(scores.values())))


def _sample(name: str, seed: int, answers: Mapping[tuple[str, str], Mapping[str, Answer]], pictures) -> Sample:
    given = {place: one[name] for place, one in answers.items()}
    first = next(iter(given.values()))
    tiles = max((one.tiles for one in given.values() if one.tiles is not None), default=None)  # as the picture shows
    return Sample(name, seed, first.question, first.references, first.category, tiles, given, pictures)


def _records(run: Run, task: str) -> tuple[Records | None, str]:
    """The records of the run's questions, and why there are none."""
    if task.partition(" ")[0] != "heldout":  # a metric may follow
        return None, f"Pictures are shown of held-out records alone, not of {task}."
    try:
        return build_records(run.config.data, run.config.seed, heldout=True), ""
    except (ConfigError, OSError, ImportError) as error:
        return None, f"The records cannot be read again: {error}"


def _places(records: Records, names: Sequence[str]) -> dict[str, int]:
    wanted, found = set(names), {}
    for index in range(min(len(records), _MOST_NAMES)):
        if len(found) == len(wanted):
            break
        if (name := records.name(index)) in wanted:
            found[name] = index
    return found


def _pictures(records: Records | None, place: int | None, run: Run) -> tuple[Picture, ...]:
    if records is None or place is None:
        return ()
    try:
        return tuple(_picture(source, run) for source in records[place].images[:_PICTURES])
    except (BadRecord, OSError):  # the files changed since
        return ()


def _picture(source: object, run: Run) -> Picture:
    tiling, vision = run.config.tiling, run.config.vision
    image = still(source, run.config.data.max_pixels, run.config.video).convert("RGB")
    plan = tiling_of(tiling, vision)(*image.size, 1 if isinstance(source, Video) else tiling.max_tiles)
    tags = tile_tags(plan, tiling.tag, tiling.max_tiles, run.config.llm.thumbnail_tag)
    return Picture(data_url(image, _SIDE, _BYTES), image.size, plan.cols, plan.rows, tags[: plan.num_regular])
