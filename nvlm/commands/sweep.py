"""`launch/train.py -m` on this machine: the runs side by side, each as a command of its own in its share of the cores.

Imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nvlm.commands import launch
from nvlm.commands.compose import runs
from nvlm.commands.swept import Swept
from nvlm.commands.words import quoted
from nvlm.config.values import Config
from nvlm.inputs.check import check_weights
from nvlm.runs.ownership import ROOT, locked
from nvlm.runs.place import check_place
from nvlm.runs.sinks import steady_streams
from nvlm.sweep import ledger
from nvlm.sweep.ledger import Row
from nvlm.sweep.plan import Cell, check_distinct, check_folders, first_rows, other_rows
from nvlm.sweep.process import Job
from nvlm.sweep.schedule import run_jobs
from nvlm.sweep.shares import Share, Wish, divide
from nvlm.sweep.show import closing, shown


def run_sweep(sweep: Swept, words: Sequence[str], configs: Sequence[Config], command: str) -> int:
    """Do what is missing of the sweep. Returns the exit status: 0 if all its runs are done, 1 if one failed, 128 + the
    signal's number if one ended the sweep.

    `words`: as Hydra understands them; `configs`: one for each of their combinations; `command`: what repeats the
    sweep. Raises ConfigError.
    """
    check_place(sweep.folder, "hydra.sweep.dir")
    shares = _shares(configs, sweep.jobs)
    cells = _cells(sweep, words, configs, shares)
    check_distinct(cells)
    check_folders(cells, sweep.folder)
    for cell in cells:
        if cell.config.resume == "auto":
            check_weights(cell.config, sweep.folder / cell.folder)
    steady_streams()
    with locked(sweep.folder, "sweep"):
        rows, stopped = _run(cells, shares, sweep.folder, command)
    print("\n".join(closing(rows, sweep.folder, command)))
    return 128 + stopped if stopped else int(any(row.status == "failed" for row in rows))


def _run(cells: Sequence[Cell], shares: Sequence[Share], where: Path, command: str) -> tuple[list[Row], int | None]:
    """Run what is missing; returns the rows of `cells` and the signal that ended the sweep, if any."""

    known = ledger.read(where)
    rows, others = first_rows(cells, known, where), other_rows(cells, known)

    def keep(rows: dict[str, Row]) -> None:
        ledger.write(where, command, rows | others)

    keep(rows)
    jobs = [_job(cell, where) for cell in cells if rows[cell.folder].status != "done"]
    with shown(where, len(shares), rows) as show:
        rows, stopped = run_jobs(jobs, shares, where, rows, keep, show)
    return [rows[cell.folder] for cell in cells], stopped


def _shares(configs: Sequence[Config], jobs: int | None) -> list[Share]:
    """The machine's shares for runs of `configs` side by side."""
    wishes = [Wish(config.parallel.replica * config.parallel.data, config.train.threads) for config in configs]
    return divide(sorted(os.sched_getaffinity(0)), _gpus(), _available_memory(), wishes, jobs)


def _cells(sweep: Swept, words: Sequence[str], configs: Sequence[Config], shares: Sequence[Share]) -> list[Cell]:
    """The runs. On CPU each is told its number of threads, on which the last bits of its results depend."""
    cells = []
    for overrides, config in zip(runs(words), configs):
        cell = Cell(sweep.name(overrides), overrides, config)
        if config.train.threads is None and not shares[0].gpus:
            threads = max(1, min(len(share.cores) for share in shares) // cell.processes)
            train = replace(config.train, threads=threads)
            overrides = (*overrides, f"train.threads={threads}")
            cell = replace(cell, overrides=overrides, config=replace(config, train=train))
        cells.append(cell)
    return cells


def _job(cell: Cell, where: Path) -> Job:
    script, folder = str(ROOT / "launch" / "train.py"), f"hydra.run.dir={quoted(str(where / cell.folder))}"
    return Job(
        folder=cell.folder,
        command=(sys.executable, script, *cell.overrides, folder),
        processes=cell.processes,
        steps=cell.config.train.steps,
        stop_seconds=cell.config.train.stop_seconds,
    )


def _gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count, visible = len(launch.gpus_here()), os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",")[:count] if visible else map(str, range(count)))


def _available_memory() -> int:
    """Bytes of memory that new processes may take."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 2**10
