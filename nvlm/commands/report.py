"""The report command: one page, Markdown and CSV files about several runs."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm.commands.mistakes import answered_or_helped
from nvlm.config.values import problem
from nvlm.report.runs import Run, folders_of, read_runs
from nvlm.runs.files import write_whole
from nvlm.runs.place import check_place, split_paths

if TYPE_CHECKING:
    from rich.table import Table

    from nvlm.report.content import Report, Task

HELP = """python launch/report.py runs=runs/sweep [key=value ...]

runs=PATH[,PATH ...]   run folders, folders of runs, or patterns of these: 'runs=runs/sweep/*tag=1d*'
out=DIR                the folder of report.html, report.md, report.csv (each run) and cells.csv; default: the folder of
                       the runs if it is the only one that is named, else runs/report
show=8                 questions on which the runs disagree, of each task, at most 40
title=TEXT             default: the name of the folder"""

_OPTIONS = ("runs", "out", "show", "title")
_KEYS = ", ".join(f"{key}=" for key in _OPTIONS)
_MOST_SHOWN = 40


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return answered_or_helped(arguments, HELP, _answer)


def _answer(arguments: Sequence[str]) -> int:
    started = time.perf_counter()
    given = _given(arguments)
    paths = split_paths(given.get("runs", ""), folders_of)
    if not paths:
        raise problem("runs", "nothing", "folders of runs", "runs=runs/sweep")
    shown = _shown(given.get("show", "8"))
    out = Path(given["out"]).expanduser() if given.get("out") else _out(paths)
    check_place(out, "out")
    runs, missing = read_runs(paths)
    from nvlm.report.content import report  # a mistyped path need not wait for it

    found = report(given.get("title") or out.resolve().name, runs, missing, shown, _commands(runs))
    _write(found, out)
    _print(found, out, time.perf_counter() - started)
    return 0


def _write(found: Report, out: Path) -> None:
    from nvlm.report.page import page
    from nvlm.report.tables import cells_csv, markdown, runs_csv

    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("report.html", page(found)),
        ("report.md", markdown(found)),
        ("report.csv", runs_csv(found)),
        ("cells.csv", cells_csv(found)),
    ):
        write_whole(out / name, text)


def _given(arguments: Sequence[str]) -> dict[str, str]:
    given = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals or key not in _OPTIONS:
            raise problem("command line", repr(word), f"one of {_KEYS}", "runs=runs/sweep")
        given[key] = value
    return given


def _shown(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) > _MOST_SHOWN:
        raise problem("show", repr(text), f"a whole number, 0 to {_MOST_SHOWN}", "show=8")
    return int(text)


def _out(paths: Sequence[str]) -> Path:
    """The folder that is named, if it is one of runs: a run's own folder has a page of its own."""
    only = Path(paths[0]).expanduser()
    if len(paths) == 1 and only.is_dir() and not (only / "config.yaml").exists():
        return only
    return Path("runs/report")


def _commands(runs: Sequence[Run]) -> dict[str, str]:
    """What repeats each run, by its folder: the words of its sweep, else those that give its configuration."""
    found = {str(run.folder): _command(run) for run in runs}
    return {folder: line for folder, line in found.items() if line}


def _command(run: Run) -> str | None:
    if run.overrides is None:
        from nvlm.commands.repeat import command

        return command(run.config)
    return f"python launch/train.py {shlex.join(run.overrides)}"


def _print(found: Report, out: Path, seconds: float) -> None:
    from rich.console import Console

    console = Console(width=120)
    for task in found.tasks:
        if task.overall:
            console.print(_table(found, task), markup=False)
    left_out = len(found.left_out)
    total = len(found.runs) + len(found.missing)
    counted = f"{total} run{'s' * (total != 1)}" + (f", of which {left_out} not counted" if left_out else "")
    console.print(f"{counted}: {out / 'report.html'} ({seconds:.1f} s)", markup=False, highlight=False, soft_wrap=True)


def _table(found: Report, task: Task) -> Table:
    from rich.table import Table
    from rich.text import Text

    from nvlm.report.words import told

    grid = found.grid
    table = Table(box=None, title=f"{task.name}: {task.metric}", title_justify="left")
    table.add_column(grid.row_title)
    for column in grid.columns:
        table.add_column(column or "score", justify="right")
    for row in grid.rows:
        cells = [task.overall.get((row, column)) for column in grid.columns]
        table.add_row(Text(row), *(told(one, task.percent) if one else "" for one in cells))
    return table
