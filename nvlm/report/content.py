"""Everything that a report says, as values: what the page, the Markdown and the CSV files are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nvlm.metrics.intervals import Interval
from nvlm.report.answers import Answer, Evaluation
from nvlm.report.budget import Cost, Equal, cost, equal
from nvlm.report.cells import Cell, Grid, grid
from nvlm.report.charts import Chart, by_tiles, columns_of, loss_curve, rows_of, score_curve
from nvlm.report.compare import Gap, column_gaps, interval, row_gaps, scores_of
from nvlm.report.looks import Look, looks
from nvlm.report.runs import DONE, Missing, Run
from nvlm.report.samples import Chosen, samples
from nvlm.report.settings import Setting, settings

_MOST_TILES = 12  # numbers of tiles that are told apart
Place = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the runs scored on one task. All mappings are by (row, column); `seeds`: finished runs."""

    name: str
    metric: str
    percent: bool
    overall: Mapping[Place, Interval]
    by_seed: Mapping[Place, Mapping[int, float]]
    categories: tuple[str, ...]
    by_category: Mapping[Place, Mapping[str, Interval]]
    tiles: tuple[int, ...]
    by_tiles: Mapping[Place, Mapping[int, Interval]]
    column_gaps: tuple[Gap, ...]
    row_gaps: tuple[Gap, ...]
    samples: Equal
    flops: Equal
    shown: Chosen
    tile_charts: tuple[Chart, ...]
    score_charts: tuple[Chart, ...]
    own_questions: bool  # each seed has its own
    partial: bool  # some run of a seed was asked other questions than the rest

    @property
    def best(self) -> Place | None:
        """The cell with the highest mean."""
        return max(self.overall, key=lambda place: self.overall[place].mean, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of it. `commands`: what repeats each run, by its folder; `notes`: what could not be read of runs."""

    title: str
    runs: tuple[Run, ...]
    missing: tuple[Missing, ...]
    grid: Grid
    tasks: tuple[Task, ...]
    costs: Mapping[Place, Cost]
    loss_charts: tuple[Chart, ...]
    flops_charts: tuple[Chart, ...]
    losses: tuple[Equal, Equal] | None  # at equal samples and FLOPs, if no task is scored
    looks: tuple[Look, ...]
    notes: tuple[str, ...]
    settings: tuple[Setting, ...]
    commands: Mapping[str, str]

    @property
    def undone(self) -> list[Run]:
        """The runs that do not count because they are not done."""
        return [run for run in self.runs if run.status != DONE]

    @property
    def left_out(self) -> list[tuple[str, str, str]]:
        """Name, state and reason of everything that does not count."""
        undone = [(run.name, run.status, run.reason) for run in self.undone]
        doubled = [(run.name, "repeated", "another run has its seed and settings") for run in self.grid.doubled]
        return [*undone, *doubled, *((one.folder.name, "no run", one.reason) for one in self.missing)]

    @property
    def left_out_alike(self) -> list[tuple[list[str], str, str]]:
        """The same, with the names of those that have state and reason in common."""
        alike: dict[tuple[str, str], list[str]] = {}
        for name, state, reason in self.left_out:
            alike.setdefault((state, reason), []).append(name)
        return [(names, state, reason) for (state, reason), names in alike.items()]

    @property
    def seeds(self) -> list[int]:
        """All seeds."""
        return sorted({run.config.seed for run in self.runs})


def report(
    title: str, runs: Sequence[Run], missing: Sequence[Missing], shown: int, commands: Mapping[str, str]
) -> Report:
    """The report on `runs`, of which there is at least one, with at most `shown` samples of each task."""
    table = grid(runs)
    names = sorted({one.task for run in runs for one in run.evaluations})
    numbers = Numbers()
    shown_looks, faults = looks(table)
    tasks = tuple(_task(table, name, shown, numbers) for name in names)
    losses = (
        None if any(task.overall for task in tasks) else (equal(table, None, "samples"), equal(table, None, "flops"))
    )
    return Report(
        title=title,
        runs=tuple(runs),
        missing=tuple(missing),
        grid=table,
        tasks=tasks,
        costs={(cell.row, cell.column): found for cell in table.cells if (found := cost(cell))},
        loss_charts=numbers.of(
            rows_of(table, lambda run: loss_curve(run, "samples"), "samples", numbers.next, log=True)
        ),
        flops_charts=numbers.of(
            columns_of(table, lambda run: loss_curve(run, "flops"), "FLOPs", numbers.next, log=True)
        ),
        losses=losses,
        looks=shown_looks,
        notes=(*(f"{run.name}: {note}" for run in runs for note in run.notes), *faults),
        settings=tuple(settings(table)),
        commands=commands,
    )


class Numbers:
    """Counts the charts of a page."""

    def __init__(self) -> None:
        self.next = 0

    def of(self, charts: Sequence[Chart]) -> tuple[Chart, ...]:
        """`charts`, counted."""
        self.next += len(charts)
        return tuple(charts)


def _task(table: Grid, name: str, shown: int, numbers: Numbers) -> Task:
    cells = {(cell.row, cell.column): cell for cell in table.cells}
    scores = {place: found for place, cell in cells.items() if (found := scores_of(cell, name))}
    asked = [(run.config.seed, last) for cell in table.cells for run in cell.runs if (last := run.last(name))]
    answers = [answer for _, last in asked for answer in last.answers.values()]
    categories = tuple(sorted({answer.category for answer in answers} - {""}))
    number = tile_numbers(asked)
    tiles = tuple(sorted(set(number.values())))[:_MOST_TILES]
    by_tiles_found = (
        _split(cells, name, tiles, lambda seed, answer: number.get((seed, answer.id))) if len(tiles) > 1 else {}
    )
    means = {place: {number: one.mean for number, one in found.items()} for place, found in by_tiles_found.items()}
    percent = all(0 <= answer.score <= 1 for answer in answers)
    ids: dict[int, set[frozenset[str]]] = {}
    for seed, last in asked:
        ids.setdefault(seed, set()).add(frozenset(last.answers))
    often = max(
        (len([1 for one in run.evaluations if one.task == name]) for cell in table.cells for run in cell.runs),
        default=0,
    )
    return Task(
        name=name,
        metric=next(
            (one.metric for cell in table.cells for run in cell.runs for one in run.evaluations if one.task == name), ""
        ),
        percent=percent,
        overall={place: found for place, one in scores.items() if (found := interval(one))},
        by_seed={place: {seed: sum(s.values()) / len(s) for seed, s in one.items()} for place, one in scores.items()},
        categories=categories,
        by_category=_split(cells, name, categories, lambda seed, answer: answer.category)
        if len(categories) > 1
        else {},
        tiles=tiles,
        by_tiles=by_tiles_found,
        column_gaps=tuple(column_gaps(table, scores)),
        row_gaps=tuple(row_gaps(table, scores)),
        samples=equal(table, name, "samples"),
        flops=equal(table, name, "flops"),
        shown=samples(table, name, shown),
        tile_charts=numbers.of(by_tiles(table, means, numbers.next, percent)) if means else (),
        score_charts=numbers.of(_scores(table, name, numbers.next, percent)) if often > 1 else (),
        own_questions=len({one for sets in ids.values() for one in sets}) > 1
        and all(len(sets) == 1 for sets in ids.values()),
        partial=any(len(sets) > 1 for sets in ids.values()),
    )


def tile_numbers(asked: Sequence[tuple[int, Evaluation]]) -> dict[tuple[int, str], int]:
    """The number of tiles of each question, by seed and id, in the run that cuts its images into most: a run with one
    tile answers the same question about a picture that others see in six."""
    numbers: dict[tuple[int, str], int] = {}
    for seed, evaluation in asked:
        for name, answer in evaluation.answers.items():
            if answer.tiles is not None:
                numbers[seed, name] = max(answer.tiles, numbers.get((seed, name), 0))
    return numbers


def _scores(table: Grid, name: str, first: int, percent: bool) -> list[Chart]:
    curve = lambda run: score_curve(run, name, "flops")  # noqa: E731
    return columns_of(table, curve, "FLOPs", first, percent=percent, dots=True)


def _split(
    cells: Mapping[Place, Cell], task: str, values: Sequence, part: Callable[[int, Answer], object]
) -> dict[Place, dict]:
    """The cells' intervals, for each of `values` on the answers with that part."""
    found: dict[Place, dict] = {}
    for place, cell in cells.items():
        for value in values:
            one = interval(scores_of(cell, task, lambda seed, answer, value=value: part(seed, answer) == value))
            if one:
                found.setdefault(place, {})[value] = one
    return found
