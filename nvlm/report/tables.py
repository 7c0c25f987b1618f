"""The report as Markdown and as CSV: the numbers of the page, and the raw ones."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence

from nvlm.report.compare import Gap
from nvlm.report.content import Report, Task
from nvlm.report.runs import Run
from nvlm.report.words import bounds, duration, findings, named, p_value, score, si, three, told

_RUN = ("run", "row", "column", "seed", "status", "step", "samples", "flops", "seconds", "tokens_per_second",
        "tiles_per_second", "peak_memory_bytes")  # fmt: skip
_SCORE = ("task", "metric", "evaluated_step", "category", "mean", "low", "high", "questions")
_CELL = ("task", "metric", "row", "column", "category", "tiles", "mean", "low", "high", "questions", "seeds")


def runs_csv(report: Report) -> str:
    """One line for each run, evaluation and kind of question; the whole evaluation has no category. A run without an
    evaluation has one line."""
    return _csv((*_RUN, *_SCORE), _run_rows(report))


def _run_rows(report: Report) -> Iterator[Sequence[object]]:
    for cell in report.grid.cells:
        for run in cell.runs:
            own = (run.name, cell.row, cell.column, run.config.seed, run.status, *_costs(run))
            for one in run.evaluations:
                for category, found in (("", one.overall), *one.by_category.items()):
                    numbers = (found.mean, found.low, found.high, found.count)
                    yield *own, one.task, one.metric, one.step, category, *numbers
            if not run.evaluations:
                yield *own, *("",) * len(_SCORE)


def _costs(run: Run) -> tuple[object, ...]:
    steps = run.steps
    sums = tuple(steps.total(name) for name in ("samples", "flops", "seconds"))
    return steps.last, *sums, steps.typical("tokens_per_second"), steps.typical("tiles_per_second"), steps.peak_memory()


def cells_csv(report: Report) -> str:
    """One line for each cell and task, kind of question and number of tiles."""
    return _csv(_CELL, _cell_rows(report))


def _cell_rows(report: Report) -> Iterator[Sequence[object]]:
    for task in report.tasks:
        for place, overall in task.overall.items():
            parts = [("", "", overall), *((name, "", one) for name, one in task.by_category.get(place, {}).items())]
            parts += [("", number, one) for number, one in task.by_tiles.get(place, {}).items()]
            for category, tiles, one in parts:
                numbers = (one.mean, one.low, one.high, one.count, len(task.by_seed[place]))
                yield task.name, task.metric, *place, category, tiles, *numbers


def _csv(head: Sequence[str], rows: Iterator[Sequence[object]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return file.getvalue()


def _cell(value: object) -> object:
    """A number with seven digits; nothing for what is not known. Text that a spreadsheet would run as a formula gets an
    apostrophe."""
    if isinstance(value, float):
        return f"{value:.7g}" if math.isfinite(value) else ""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def markdown(report: Report) -> str:
    """The tables of scores, differences and costs, and what does not count."""
    lines = [f"# {_text(report.title)}", ""]
    for task in report.tasks:
        lines += _task(report, task) if task.overall else [f"## {_text(task.name)}", "", "No run is done.", ""]
    lines += _cost_table(report) if report.costs else []
    undone = [f"- {_text(name)}: {state}, {_text(reason)}" for name, state, reason in report.left_out]
    return "\n".join([*lines, *(["## Not counted", "", *undone, ""] if undone else [])])


def _task(report: Report, task: Task) -> list[str]:
    grid, unit = report.grid, ", %" if task.percent else ""
    rows = [[row, *(_score(task, (row, column)) for column in grid.columns)] for row in grid.rows]
    lines = [f"## {_text(task.name)}", "", f"{task.metric}{unit}: mean over seeds [95% interval]", ""]
    lines += [*(f"- {_text(one)}" for one in findings(report, task)), ""]
    lines += table([grid.row_title, *(column or "score" for column in grid.columns)], rows)
    for gaps, against in ((task.column_gaps, grid.column_title), (task.row_gaps, grid.row_title)):
        if gaps:
            lines += [f"### By {_text(against)}", "", *table(_GAP, [_gap(gap, task) for gap in gaps])]
    return lines


_GAP = ("this", "minus", "difference", "95% interval", "better", "worse", "p", "p, Holm", "")


def _gap(gap: Gap, task: Task) -> list[str]:
    numbers = [score(gap.mean, task.percent, True), bounds(gap.low, gap.high, task.percent, True)]
    counts = [str(gap.better), str(gap.worse), p_value(gap.p), p_value(gap.holm)]
    return [named(gap.this), named(gap.base), *numbers, *counts, "certain" if gap.certain else ""]


def _score(task: Task, place: tuple[str, str]) -> str:
    one = task.overall.get(place)
    return told(one, task.percent) if one else ""


def _cost_table(report: Report) -> list[str]:
    head = ("", "samples/s", "tokens/s", "tiles/s", "FLOPs per sample", "peak memory", "time", "FLOPs in all")
    rows = [
        [
            named(place), three(one.samples_per_second), three(one.tokens_per_second), three(one.tiles_per_second),
            si(one.flops_per_sample, "FLOP"), si(one.memory, "B"), duration(one.seconds), si(one.flops, "FLOP"),
        ]
        for place, one in report.costs.items()
    ]  # fmt: skip
    return ["## Speed, FLOPs and memory", "", *table(head, rows)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown and an empty line; the first column is text, the others are numbers."""
    lines = [[_text(one) for one in head], ["---", *["---:"] * (len(head) - 1)]]
    lines += [[_text(one) for one in row] for row in rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _text(text: str) -> str:
    """`text` as text: no Markdown, no HTML, one line."""
    plain = " ".join(str(text).replace("\\", "\\\\").split())
    return "".join({"<": "&lt;", "&": "&amp;"}.get(c, f"\\{c}" if c in "|`*_" else c) for c in plain)
