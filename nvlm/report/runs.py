"""The runs that a report is about: found by the paths that the user names, read from their folders."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nvlm.config.fields import named
from nvlm.config.mapping import to_mapping
from nvlm.config.values import Config, ConfigError, problem
from nvlm.report.answers import Evaluation, read_evaluations
from nvlm.report.history import Steps, read_steps
from nvlm.runs.folder import has_run, read_run_config
from nvlm.runs.ownership import flat
from nvlm.sweep import ledger
from nvlm.sweep.ledger import Row

DONE, UNFINISHED, DIVERGED, FAILED = "done", "unfinished", "diverged", "failed"
_DEPTH = 2  # folders between the one that is named and a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as its folder shows it. `values`: its configuration by dotted key; `status`: one of the four above, with
    the `reason` of the last three; `overrides`: the words of its command, if a sweep wrote them down; `commit`: of the
    code."""

    folder: Path
    config: Config
    values: Mapping[str, object]
    steps: Steps
    evaluations: tuple[Evaluation, ...]
    status: str
    reason: str
    notes: tuple[str, ...]
    overrides: tuple[str, ...] | None
    commit: str | None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    def last(self, task: str) -> Evaluation | None:
        """The last evaluation of `task`, unless the run is not done."""
        found = [one for one in self.evaluations if one.task == task and one.answers]
        return found[-1] if found and self.status == DONE and found[-1].step == self.config.train.steps else None


@dataclass(frozen=True, slots=True)
class Missing:
    """A folder that gives no run, and the reason."""

    folder: Path
    reason: str


def read_runs(paths: Sequence[str]) -> tuple[list[Run], list[Missing]]:
    """The runs in `paths`, which are run folders, folders of runs, or patterns of these. Raises ConfigError if there is
    none."""
    folders = [folder for path in paths for folder in _matching(path)]
    found = {folder: list(_found(folder)) for folder in folders}
    parents = {one.parent for inner in found.values() for one in inner}
    sweeps = {folder: ledger.read(folder) for folder in {*folders, *parents}}
    known = {(folder / name).resolve(): row for folder, rows in sweeps.items() for name, row in rows.items()}
    runs: list[Run] = []
    missing: list[Missing] = []
    for folder in dict.fromkeys(one.resolve() for inner in found.values() for one in inner):
        try:
            runs.append(_read(folder, known.get(folder)))
        except (ConfigError, OSError, ValueError, ArithmeticError, RecursionError) as error:
            missing.append(Missing(folder, str(error)))
    # A run that left no folder is told if its sweep was named, not if single runs of it were.
    within = [folder for folder in sweeps if any(folder.is_relative_to(one) for one in folders)]
    listed = {(folder / name).resolve() for folder in within for name in sweeps[folder]}
    read = {run.folder for run in runs} | {one.folder for one in missing}
    missing += [Missing(folder, _why(known[folder])) for folder in sorted(listed - read)]
    missing += [Missing(folder, "no run") for folder, inner in found.items() if not (sweeps[folder] or inner)]
    if not runs:
        got = f"{', '.join(paths)}, where nothing can be shown ({_reasons(missing)})"
        raise problem("runs", got, "folders of runs that have begun", "runs=runs/sweep")
    return _by_metric(runs), missing


def _by_metric(runs: Sequence[Run]) -> list[Run]:
    """`runs`, in which a task that was scored by several metrics is a task for each of them: their scores do not
    compare."""
    metrics: dict[str, set[str]] = {}
    for run in runs:
        for one in run.evaluations:
            metrics.setdefault(one.task, set()).add(one.metric)

    def apart(one: Evaluation) -> Evaluation:
        return replace(one, task=f"{one.task} ({one.metric})") if len(metrics[one.task]) > 1 else one

    return [replace(run, evaluations=tuple(map(apart, run.evaluations))) for run in runs]


def _reasons(missing: Sequence[Missing]) -> str:
    """What the first folder lacks, and how many others there are."""
    more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"{missing[0].folder}: {missing[0].reason}{more}"


def folders_of(path: str) -> list[Path]:
    """The folders that `path` names or, as a pattern, matches; none if there are none."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return [Path(path)]
    return sorted(Path(one) for one in glob.glob(path, recursive=True) if os.path.isdir(one))


def _matching(path: str) -> list[Path]:
    """The same. Raises ConfigError if there are none."""
    found = folders_of(path)
    if not found:
        raise problem("runs", named(path), "a folder of runs, or a pattern that matches some", "runs=runs/sweep")
    return found


def _found(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The run folders in `folder`, which may be one itself. Links are not followed downwards."""
    if (folder / "config.yaml").is_file():
        yield folder
    elif depth:
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
                yield from _found(inner, depth - 1)


def _why(row: Row) -> str:
    return f"{row.status}: {row.reason}" if row.reason else row.status


def _read(folder: Path, row: Row | None) -> Run:
    if not has_run(folder):
        raise problem(str(folder / "config.yaml"), "another file", "the configuration of a run", "leave the folder out")
    config = read_run_config(folder / "checkpoints" / "step")
    steps, whole = read_steps(folder / "metrics.jsonl", config.parallel.replica * config.parallel.data)
    evaluations, faults = read_evaluations(folder)
    status, reason = _status(config, steps, row)
    cut = () if whole else (f"metrics.jsonl is damaged after step {steps.last}: later steps are not shown",)
    return Run(
        folder=folder,
        config=config,
        values=flat(to_mapping(config)),
        steps=steps,
        evaluations=evaluations,
        status=status,
        reason=reason,
        notes=(*cut, *faults),
        overrides=row.overrides if row else None,
        commit=_commit(folder),
    )


def _status(config: Config, steps: Steps, row: Row | None) -> tuple[str, str]:
    """How the run stands, and why if it is not done."""
    bad = ~np.isfinite(steps.loss) | ~steps.updated
    if len(steps) and bad[-min(config.train.max_bad_steps, len(steps)) :].all():
        return DIVERGED, f"no usable update in the steps up to {steps.last}"
    if row and row.status == "failed":
        return FAILED, row.reason or "the sweep gives no reason"
    if steps.last < config.train.steps:
        return UNFINISHED, f"step {steps.last:,} of {config.train.steps:,}"
    return DONE, ""


def _commit(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "environment.json").read_text("utf-8")).get("git_commit")
    except (OSError, ValueError, AttributeError):
        return None
    return found[:12] if isinstance(found, str) else None
