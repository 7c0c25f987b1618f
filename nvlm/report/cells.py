"""Runs as a table: what distinguishes them makes rows and columns; runs that differ only in their seed share a cell.

An axis is something by which runs differ: the architecture, the tiling, or any other key. A key whose value follows
from the axes before it is none: each architecture has its own lengths, for example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvlm.arch.registry import description
from nvlm.report.runs import DONE, Run
from nvlm.tiling.tags import TAG_STYLES

SEED, ARCHITECTURE, TILING = "seed", "arch.name", "tiling"
_TILING_KEYS = ("tiling.tag", "tiling.max_tiles")
_TAG_NAMES = {"none": "no tag", "1d": "1-D", "2d_grid": "2-D grid", "2d_bbox": "2-D box"}
_TAG_ORDER = ("none", "2d_grid", "2d_bbox", "1d")  # the order of the paper's Tables 1 and 2, from the lowest score
_BASE_TAG = "no tag"
# What tells runs apart, but changes nothing that is measured: names, and how a run is watched, stored and spread.
_ASIDE = ("name", "resume", "dry_run", "profile", "gpu", "logging.", "evaluate.", "parallel.", "data.workers")
_ASIDE_TRAIN = ("train.threads", "train.log_every", "train.save_every", "train.keep", "train.async_save")
_LAST_ASIDE = ("train.save_frozen", "train.stop_seconds", "train.offload", "train.recompute", "train.micro_batch")
ASIDE = (*_ASIDE, *_ASIDE_TRAIN, *_LAST_ASIDE)


@dataclass(frozen=True, slots=True)
class Axis:
    """Something by which runs differ, with the names of its values in order."""

    key: str
    title: str
    values: tuple[str, ...]

    @property
    def base(self) -> str:
        """The value with which the others are compared."""
        return _BASE_TAG if self.key == TILING and _BASE_TAG in self.values else self.values[0]


@dataclass(frozen=True, slots=True)
class Cell:
    """The runs of one row and column, in the order of their seeds."""

    row: str
    column: str
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """All runs. `rows` and `columns`: the names that occur; `base_row`, `base_column`: those with which others are
    compared; `doubled`: runs that are left out because another in their cell has the same seed; `parts`: the values
    in a row's name, one for each axis."""

    row_title: str
    column_title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    base_row: str
    base_column: str
    cells: tuple[Cell, ...]
    doubled: tuple[Run, ...]
    parts: Mapping[str, tuple[str, ...]]

    def cell(self, row: str, column: str) -> Cell | None:
        """The cell there, if any run belongs to it."""
        return next((cell for cell in self.cells if (cell.row, cell.column) == (row, column)), None)

    @property
    def titled(self) -> bool:
        """Whether there is more than one column."""
        return len(self.columns) > 1


def grid(runs: Sequence[Run]) -> Grid:
    """The table of `runs`, of which there is at least one. Tiling makes the columns if runs differ in it; otherwise
    the last axis does, if there is more than one. Of runs in a cell with the same seed, only the first is in it."""
    axes = _axes(runs)
    across = next((axis for axis in axes if axis.key == TILING), axes[-1] if len(axes) > 1 else None)
    down = [axis for axis in axes if axis is not across]
    placed: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        place = _joined(run, down), value_of(run, across.key) if across else ""
        placed.setdefault(place, []).append(run)
    rows = sorted({row for row, _ in placed}, key=lambda row: _rank(row, down, placed))
    columns = tuple(one for one in (across.values if across else ("",)) if any(column == one for _, column in placed))
    order = {place: (rows.index(place[0]), columns.index(place[1])) for place in placed}
    kept = {place: _by_seed(placed[place]) for place in sorted(placed, key=order.__getitem__)}
    return Grid(
        row_title=", ".join(axis.title for axis in down) or _title(ARCHITECTURE),
        column_title=across.title if across else "",
        rows=tuple(rows),
        columns=columns,
        base_row=rows[0],
        base_column=across.base if across else "",
        cells=tuple(Cell(*place, own) for place, own in kept.items()),
        parts={_joined(run, down): tuple(value_of(run, axis.key) for axis in down) for run in runs},
        doubled=tuple(
            run for place, found in placed.items() for run in found if all(run is not one for one in kept[place])
        ),
    )


def _by_seed(runs: Sequence[Run]) -> tuple[Run, ...]:
    """One run for each seed, in order: one that is done, if there is one."""
    found: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (run.config.seed, run.status != DONE, str(run.folder))):
        found.setdefault(run.config.seed, run)
    return tuple(found.values())


def _joined(run: Run, axes: Sequence[Axis]) -> str:
    """A row's name: the values of its axes; a run's architecture if there is no axis."""
    return ", ".join(_told(axis, value_of(run, axis.key)) for axis in axes) or value_of(run, ARCHITECTURE)


def _told(axis: Axis, value: str) -> str:
    return value if axis.key in (ARCHITECTURE, TILING) else f"{axis.title}={value}"


def _rank(row: str, axes: Sequence[Axis], placed: dict[tuple[str, str], list[Run]]) -> tuple[int, ...]:
    run = next(runs[0] for place, runs in placed.items() if place[0] == row)
    return tuple(axis.values.index(value_of(run, axis.key)) for axis in axes)


def value_of(run: Run, key: str) -> str:
    """The value of an axis in words."""
    if key == ARCHITECTURE:
        return description(run.config.arch.name).title
    if key == TILING:
        return _tiling(run)
    return shown(run.values.get(key))


def shown(value: object) -> str:
    """A value as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    return "null" if value is None else repr(value) if isinstance(value, float) else str(value)


def _tiling(run: Run) -> str:
    if run.config.tiling.max_tiles == 1:
        return "one tile"
    return _TAG_NAMES[run.config.tiling.tag]


def _axes(runs: Sequence[Run]) -> list[Axis]:
    """The axes of `runs`, those of the paper's tables first."""
    every = dict.fromkeys(key for run in runs for key in run.values)
    differing = [key for key in every if len({_plain(run, key) for run in runs}) > 1]
    keys = [ARCHITECTURE] * (ARCHITECTURE in differing) + [TILING] * any(key in differing for key in _TILING_KEYS)
    for key in differing:
        own = key in (SEED, ARCHITECTURE) or (key == "tiling.tag") or key.startswith(ASIDE)
        # Where a run starts from is its seed's: the previous stage has seeds, too.
        known = (*keys, SEED) if key.startswith("init.") else tuple(keys)
        if not own and not _follows(runs, key, known):
            keys.append(key)
    return [Axis(key, _title(key), _ordered(runs, key)) for key in keys]


def _title(key: str) -> str:
    return {ARCHITECTURE: "architecture", TILING: "tile tag"}.get(key, key)


def _ordered(runs: Sequence[Run], key: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value_of(run, key) for run in sorted(runs, key=lambda run: _sort_key(run, key))))


def _sort_key(run: Run, key: str) -> tuple:
    """Architectures and tags as in the paper, numbers by size, other values as text."""
    if key == ARCHITECTURE:
        kind = description(run.config.arch.name)
        return (bool(kind.keys), kind.tiles_in_stream)
    if key == TILING:
        assert set(_TAG_ORDER) == set(TAG_STYLES)
        tiling = run.config.tiling
        return (tiling.max_tiles > 1, _TAG_ORDER.index(tiling.tag))
    value = run.values.get(key)
    number = isinstance(value, int | float)
    return (not number, value if number else 0, shown(value))


def _follows(runs: Sequence[Run], key: str, known: Sequence[str]) -> bool:
    """Whether the value of `key` is a function of the axes `known`."""
    found: dict[tuple[str, ...], str] = {}
    return all(
        found.setdefault(tuple(_axis_value(run, axis) for axis in known), _plain(run, key)) == _plain(run, key)
        for run in runs
    )


def _axis_value(run: Run, key: str) -> str:
    return _tiling(run) if key == TILING else _plain(run, key)


def _plain(run: Run, key: str) -> str:
    return repr(run.values.get(key))
