"""The page that shows where an answer looked: one HTML file without scripts or external references.

Shapes: L gated layers, N answer tokens, T cross-attended tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import jinja2
import numpy as np

from nvlm.explain.looks import Looks
from nvlm.inspect.document import environment
from nvlm.inspect.page import fitted, percent
from nvlm.inspect.pictures import Picture

MOST_TOKENS = 100  # with pictures of their own; all are in the overview and in the values file
_VEIL = 0.86  # of a tile that got nothing


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked of which model. `pictures`: of the first images."""

    model: str
    question: str
    answer: str
    pictures: Sequence[Picture]


@dataclass(frozen=True, slots=True)
class Cell:
    """A number of a tile. `weight`: 0 to 1, how strongly it is coloured."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Row:
    """Numbers of all tiles. `kind`: whether it sums up, and what it measures."""

    name: str
    note: str
    cells: tuple[Cell, ...]
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Shown:
    """A token of the answer. `attention`, `hidden`: what is drawn on the pictures, by tile; `rows`: its table."""

    text: str
    probability: str
    attention: tuple[Cell, ...]
    hidden: tuple[Cell, ...]
    rows: tuple[Row, ...]


def page(looks: Looks, asked: Asked, values: str) -> str:
    """The whole page as HTML. `values`: the name of the file with the numbers."""
    names = [tile_name(looks, number) for number in range(len(looks.tiles))]
    return (
        _templates()
        .get_template("page.html.jinja")
        .render(
            looks=looks,
            asked=asked,
            values=values,
            shown=[_shown(looks, number) for number in range(min(len(looks.tokens), MOST_TOKENS))],
            overview=_overview(looks),
            places={(tile.image, tile.tile): number for number, tile in enumerate(looks.tiles)},
            names=names,
            thumbnail_in_stream="thumbnail" not in names,
        )
    )


def tile_name(looks: Looks, number: int) -> str:
    """A tile in words, without its picture's number."""
    tile = looks.tiles[number]
    columns, rows = looks.grids[tile.image]
    if columns * rows == 1:
        return "whole picture"
    return "thumbnail" if tile.tile == columns * rows else f"tile {tile.tile + 1}"


def _overview(looks: Looks) -> list[tuple[str, tuple[Cell, ...], tuple[Cell, ...]]]:
    """(token, attention, probability without the tile) of each token."""
    rows = enumerate(zip(looks.tokens, looks.gated))
    return [(_visible(token.text), _shares(shares_T), _without(looks, number)) for number, (token, shares_T) in rows]


def _shares(shares_T: np.ndarray) -> tuple[Cell, ...]:
    return tuple(Cell(percent(float(share)), float(share)) for share in shares_T)


def _without(looks: Looks, number: int) -> tuple[Cell, ...]:
    """The token's probability without each tile, coloured by the part of it that is lost."""
    before = looks.tokens[number].probability
    left_T = np.exp(-looks.effect[number])
    return tuple(Cell(percent(min(1.0, before * left)), max(0.0, 1 - left)) for left in left_T.tolist())


def _shown(looks: Looks, number: int) -> Shown:
    token, gated_T = looks.tokens[number], looks.gated[number]
    drawn = gated_T / max(float(gated_T.max()), 1e-12)
    return Shown(
        text=_visible(token.text),
        probability=percent(token.probability),
        attention=tuple(Cell(percent(float(share)), float(weight)) for share, weight in zip(gated_T, drawn)),
        hidden=_without(looks, number),
        rows=tuple(_rows(looks, number)),
    )


def _rows(looks: Looks, number: int) -> list[Row]:
    layers = [f"layer {layer}" for layer in looks.layers]
    gates = [f"gate {gate:+.2f}" for gate in looks.gates]
    found = [Row(*named, _shares(shares)) for *named, shares in zip(layers, gates, looks.attention[:, number])]
    found.append(Row("all layers", "weighted by gate", _shares(looks.gated[number]), "total"))
    if looks.tags.any():
        sizes_L = np.abs(looks.gates)
        tags_T = np.tensordot(sizes_L / max(float(sizes_L.sum()), 1e-12), looks.tags[:, number], axes=1)
        found.append(Row("of it, on the tag", "weighted by gate", _shares(tags_T), "part"))
    most = max(float(looks.strength.max()), 1e-12)
    for name, strength_T in zip(layers, looks.strength[:, number].tolist()):
        cells = tuple(Cell(f"{one:.3f}", one / most) for one in strength_T)
        found.append(Row(name, "added / text stream", cells, "strength"))
    found.append(Row("without the tile", "probability of the token", _without(looks, number), "total hidden"))
    return found


def _visible(text: str) -> str:
    """A token's text with its white space made visible."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"


@cache
def _templates() -> jinja2.Environment:
    templates = environment("nvlm.explain")
    templates.globals |= {"veil": lambda cell: round(_VEIL * (1 - min(1.0, cell.weight)), 3), "most": MOST_TOKENS}
    templates.filters |= {"fitted": fitted, "percent": percent}
    return templates
