"""Where answers looked: the files that `launch/generate.py explain=RUN/looks/NAME.html` leaves in a run's folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nvlm.explain.looks import Looks, from_mapping
from nvlm.report.cells import Grid
from nvlm.report.runs import Run

_MOST, _MOST_TOKENS = 12, 16  # answers; tokens of each
_LARGEST = 20_000_000  # bytes of a file
_MOST_PICTURES = 2  # of an answer
_JPEG = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/=]{1,80000}")


@dataclass(frozen=True, slots=True)
class Square:
    """A tile's place in the map of its image, from 1, or None for the thumbnail. `share`: of the gated attention;
    `lost`: the part of the token's probability that is lost if the tile is hidden."""

    place: tuple[int, int] | None
    image: int
    share: float
    lost: float
    tag: str


@dataclass(frozen=True, slots=True)
class Look:
    """An answer of a run: (text, squares) of its first tokens. `columns`: of each image's grid of tiles; `pictures`:
    JPEG data URLs, if the file has them; `hidden`: tokens that are not shown."""

    row: str
    column: str
    run: str
    question: str
    answer: str
    columns: tuple[int, ...]
    pictures: tuple[str, ...]
    tokens: tuple[tuple[str, tuple[Square, ...]], ...]
    hidden: int


def looks(grid: Grid) -> tuple[tuple[Look, ...], tuple[str, ...]]:
    """What the runs' folders hold, question by question, and what is wrong with files that cannot be read."""
    found, faults = [], []
    for cell in grid.cells:
        for run in cell.runs:
            for path in sorted((run.folder / "looks").glob("*.looks.json")):
                try:
                    found.append(_look(cell.row, cell.column, run, path))
                except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
                    faults.append(f"{run.name}: {path.name} cannot be read ({type(error).__name__}: {error})"[:300])
    found.sort(key=lambda look: look.question)
    return tuple(found[:_MOST]), tuple(faults)


def _look(row: str, column: str, run: Run, path) -> Look:
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"more than {_LARGEST:,} bytes")
    values = json.loads(path.read_text("utf-8"))
    one = from_mapping(values)
    shown = zip(one.tokens[:_MOST_TOKENS], one.gated, one.effect)
    return Look(
        row=row,
        column=column,
        run=run.name,
        question=str(values["question"]),
        answer=str(values["answer"]),
        columns=tuple(columns for columns, _ in one.grids),
        pictures=tuple(url for url in values.get("pictures", ()) if _JPEG.fullmatch(url))[:_MOST_PICTURES],
        tokens=tuple((token.text, _squares(one, shares, effects)) for token, shares, effects in shown),
        hidden=max(0, len(one.tokens) - _MOST_TOKENS),
    )


def _squares(one: Looks, shares: Sequence[float], effects: Sequence[float]) -> tuple[Square, ...]:
    """The tiles of a token, in order; the thumbnail is an image's last tile."""
    squares = []
    for tile, share, effect in zip(one.tiles, shares, effects):
        columns, rows = one.grids[tile.image]
        regular = columns * rows if columns * rows > 1 else 0
        place = (tile.tile % columns + 1, tile.tile // columns + 1) if tile.tile < regular else None
        squares.append(Square(place, tile.image, _part(share), _part(-math.expm1(-effect)), tile.tag))
    return tuple(squares)


def _part(value: float) -> float:
    return min(max(float(value), 0.0), 1.0) + 0.0  # without the sign of -0
