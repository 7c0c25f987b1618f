"""The runs of a sweep: which configurations clash, and which are still to be done. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nvlm.config.mapping import to_mapping
from nvlm.config.values import Config, ConfigError, problem
from nvlm.runs.folder import read_run_config, steps_done
from nvlm.runs.ownership import check_folder, flat
from nvlm.sweep.ledger import Row


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep: its folder within the sweep's, its command-line words, and its configuration."""

    folder: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def processes(self) -> int:
        """Number of processes, with one GPU for each where there are GPUs."""
        return self.config.parallel.replica * self.config.parallel.data


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError if two runs have the same name, that is, would share a folder."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        fix = "each value of a key once"
        raise problem("sweep", f"two runs for the folder {twice[0]}", "a folder for each run", fix)


def check_distinct(cells: Sequence[Cell]) -> None:
    """Raise ConfigError if two of the `cells` are the same run under two names."""
    configs: dict[str, Cell] = {}
    for cell in cells:
        same = configs.setdefault(repr(to_mapping(replace(cell.config, name=""))), cell)
        if same is not cell:
            got = f"{same.folder} and {cell.folder}, which have the same configuration"
            raise problem("sweep", got, "runs that differ", "leave out the key that changes nothing")


def check_folders(cells: Sequence[Cell], where: Path) -> None:
    """Raise ConfigError if a folder holds a run of another configuration, with the keys that differ. Only reads."""
    refused = []
    for cell in cells:
        try:
            check_folder(cell.config, where / cell.folder)
        except ConfigError as error:
            refused.append(str(error))
    if refused:
        others = f" ({len(refused)} of the {len(cells)} runs are refused)" if len(refused) > 1 else ""
        raise ConfigError(refused[0] + others)


def is_done(cell: Cell, row: Row | None, where: Path) -> bool:
    """Whether a sweep has finished this run in the folder `where`: trained it to its last step, and evaluated it as it
    is configured now. `check_folders` has made sure that it was trained as configured now."""
    folder = where / cell.folder
    try:
        if row is None or row.status != "done" or steps_done(folder) < cell.config.train.steps:
            return False
        begun = read_run_config(folder / "checkpoints" / "latest")
    except ConfigError:
        return False
    return _evaluation(begun) == _evaluation(cell.config)


def first_rows(cells: Sequence[Cell], known: Mapping[str, Row], where: Path) -> dict[str, Row]:
    """The rows of `cells` at the start: done, or waiting. `known`: the rows that earlier commands left."""
    rows = {}
    for cell in cells:
        row, done = known.get(cell.folder), is_done(cell, known.get(cell.folder), where)
        rows[cell.folder] = Row(
            folder=cell.folder,
            overrides=row.overrides if row and done else cell.overrides,
            status="done" if done else "waiting",
            seconds=row.seconds if row else 0.0,
        )
    return rows


def other_rows(cells: Sequence[Cell], known: Mapping[str, Row]) -> dict[str, Row]:
    """The rows of runs that earlier commands asked for and this one does not. None of them is running."""
    ours = {cell.folder for cell in cells}
    others = [row for folder, row in known.items() if folder not in ours]
    return {row.folder: replace(row, status="waiting") if row.status == "running" else row for row in others}


def _evaluation(config: Config) -> dict[str, object]:
    keys = flat(to_mapping(config))
    return {key: value for key, value in keys.items() if key.startswith("evaluate.") or ".heldout_" in key}
