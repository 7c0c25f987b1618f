"""The prepare command: walks the records of a run once and keeps an index of them. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nvlm.arch.registry import placement_rule
from nvlm.commands.compose import check_overrides
from nvlm.commands.mistakes import answered_or_helped
from nvlm.config.values import Config, problem
from nvlm.data.index.build import alone, prepare
from nvlm.data.index.files import Meta
from nvlm.data.index.opened import folder_name
from nvlm.data.index.walk import Walk
from nvlm.data.look import check_data
from nvlm.data.outline import build_processor
from nvlm.data.sources.registry import named_sources

HELP = """python launch/prepare.py data.index=DIR data=jsonl data.path=FILE [key=value ...]

Reads all records once and writes DIR, from which a run with the same keys plans its steps without reading records.
It can be ended at any time: started again, it goes on where it was. A DIR that is up to date is left as it is.

data.index=DIR  the folder to write
workers=N       processes; default: one for each core
other keys      as for launch/train.py"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return answered_or_helped(arguments, HELP, _answer)


def _answer(arguments: Sequence[str]) -> int:
    own = [word.partition("=")[2] for word in arguments if word.startswith("workers=")]
    configs = check_overrides([word for word in arguments if not word.startswith("workers=")], ("workers",))
    if len(configs) != 1:
        raise problem("command line", f"{len(configs)} configurations", "one", "give each key one value")
    (config,) = configs
    if config.data.index is None:
        raise problem("data.index", "nothing", "the folder to write", "data.index=DIR")
    workers = _workers(own[-1]) if own else len(os.sched_getaffinity(0))
    _print(_prepared(config, Path(config.data.index), workers), config.data.index)
    return 0


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise problem("workers", repr(text), "a whole number of at least 1", "workers=4")
    return int(text)


def _prepared(config: Config, folder: Path, workers: int) -> dict[str, Meta]:
    """The index of each source, by the name of its folder."""
    rule = placement_rule(config.arch.name)
    check_data(replace(config, data=replace(config.data, index=None)), rule)
    processor = build_processor(config, rule)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    found = {}
    with alone(folder), Progress(*columns, console=Console(stderr=True)) as progress:
        for name, source in named_sources(config.data.source).items():
            task = progress.add_task(label := folder_name(name), total=None)
            walk = Walk(source, name, config.seed, processor, folder / f".{label}.partial")

            def report(done: int, whole: int, task=task) -> None:
                progress.update(task, completed=done, total=whole)

            found[label] = prepare(walk, folder / label, workers, report)
    return found


def _print(found: dict[str, Meta], folder: str) -> None:
    table = Table(title=folder, title_justify="left")
    for heading in ("source", "records", "images", "text tokens", "bad records"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, meta in found.items():
        table.add_row(name, *(f"{count:,}" for count in (meta.records, meta.pictures, meta.tokens, meta.bad)))
    Console(file=sys.stdout).print(table)
