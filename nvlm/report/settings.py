"""The keys in which the configurations of a report differ, and which runs have which value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvlm.report.cells import Grid, shown
from nvlm.report.runs import Run

_UNTOLD = ("name", "seed", "resume", "dry_run")  # of how a run was started
_LONGEST = 160


@dataclass(frozen=True, slots=True)
class Setting:
    """A key with its values in words, each with the names of the runs that have it."""

    key: str
    values: tuple[tuple[str, str], ...]


def settings(grid: Grid) -> list[Setting]:
    """All keys that differ between runs, with the runs named as shortly as the values allow: by row, by column, by
    both, or by seed."""
    runs = [(run, cell.row, cell.column) for cell in grid.cells for run in cell.runs]
    keys = dict.fromkeys(key for run, _, _ in runs for key in run.values)
    differing = [key for key in keys if len({repr(run.values.get(key)) for run, _, _ in runs}) > 1]
    return [_setting(key, runs) for key in differing if key not in _UNTOLD]


Placed = tuple[Run, str, str]
_GROUPINGS: tuple[Callable[[Placed], tuple[str, ...]], ...] = (
    lambda one: (one[1],),
    lambda one: (one[2],),
    lambda one: (one[1], one[2]),
    lambda one: (f"seed {one[0].config.seed}",),
    lambda one: (one[1], one[2], f"seed {one[0].config.seed}"),
)


def _setting(key: str, runs: Sequence[Placed]) -> Setting:
    grouping = next((one for one in _GROUPINGS if _determines(one, key, runs)), _GROUPINGS[-1])
    values: dict[str, dict[str, None]] = {}
    for placed in runs:
        text = shown(placed[0].values.get(key)) if key in placed[0].values else "not set"
        values.setdefault(text, {})[", ".join(filter(None, grouping(placed)))] = None
    return Setting(key, tuple((value[:_LONGEST], "; ".join(names)) for value, names in values.items()))


def _determines(grouping: Callable[[Placed], tuple[str, ...]], key: str, runs: Sequence[Placed]) -> bool:
    found: dict[tuple[str, ...], str] = {}
    return all(
        found.setdefault(grouping(one), repr(one[0].values.get(key))) == repr(one[0].values.get(key)) for one in runs
    )
