"""The page: one HTML file without external references. Jinja escapes everything that comes from the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import jinja2

from nvlm.arch.description import Description
from nvlm.arch.registry import placement_rule
from nvlm.config.tiles import tiling_of
from nvlm.config.values import Config
from nvlm.inspect.charts import Histogram, histogram
from nvlm.inspect.count import Tally, added
from nvlm.inspect.document import environment
from nvlm.inspect.rows import Packed
from nvlm.inspect.samples import Shown
from nvlm.inspect.sight import Stretch
from nvlm.inspect.stream import TAG, TILE, Box
from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import Piece, PlacementRule
from nvlm.tiling.tags import tile_tags

_MOST_BOXES = 1000  # of a record
_MOST_ROWS, _MOST_REPLICAS, _MOST_STRETCHES = 16, 4, 40
_MOST_GRIDS = 9
_HISTOGRAMS = (
    ("length", "Text stream", "tokens by record, tile tokens included"),
    ("keys", "Cross-attended keys", "tokens by record"),
    ("tiles", "Tiles", "by record, thumbnails included"),
    ("width", "Width of pictures", "px"),
    ("height", "Height of pictures", "px"),
)


@dataclass(frozen=True, slots=True)
class Found:
    """What an inspection found. `names`: of the packed records by their numbers; `sampled`: not all were inspected."""

    tallies: Mapping[str, Tally]
    shown: Sequence[Shown]
    packed: Packed
    names: Mapping[int, str]
    sampled: bool
    decoded: bool  # not only the headers of images were read
    max_bad: float

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of boxes that occur."""
        return frozenset(box.kind for one in self.shown for box in one.boxes)

    @property
    def refused(self) -> tuple[str, ...]:
        """The sources of which more than `max_bad` of the records are bad."""
        return tuple(name for name, tally in self.tallies.items() if tally.bad_share > self.max_bad)


def page(config: Config, kind: Description, found: Found) -> str:
    """The whole page as HTML."""
    total = added(list(found.tallies.values()))
    return (
        _templates()
        .get_template("page.html.jinja")
        .render(config=config, kind=kind, found=found, total=total, **_parts(config, found, total))
    )


def _parts(config: Config, found: Found, total: Tally) -> dict[str, object]:
    """What the page shows besides what was found."""
    return {
        "sources": [*found.tallies.items(), *([(None, total)] if len(found.tallies) > 1 else [])],
        "example": _example(config, placement_rule(config.arch.name)),
        "histograms": _histograms(total),
        "grids": total.by_grid.most_common(_MOST_GRIDS),
        "other_grids": max(0, len(total.by_grid) - _MOST_GRIDS),
        "limits": {"boxes": _MOST_BOXES, "rows": _MOST_ROWS, "replicas": _MOST_REPLICAS, "seen": _MOST_STRETCHES},
    }


@dataclass(frozen=True, slots=True)
class Example:
    """Where the tiles of one picture go: (kind, text) of each piece of the text stream and of the keys."""

    plan: TilePlan
    tags: tuple[str, ...]
    stream: tuple[tuple[str, str], ...]
    keys: tuple[tuple[str, str], ...]


def _example(config: Config, rule: PlacementRule) -> Example:
    """A picture of 3 x 2 tiles, or of as many as the configuration allows."""
    most = config.tiling.max_tiles
    plan = tiling_of(config.tiling, config.vision)(1200, 800, min(most, 6))
    tags = tile_tags(plan, config.tiling.tag, most, config.llm.thumbnail_tag)
    lengths = [int(bool(tag)) for tag in tags]
    placed = rule(plan, [(0,) * length for length in lengths], [config.vision.tile_tokens] * plan.num_tiles)

    def named(pieces: Sequence[Piece]) -> tuple[tuple[str, str], ...]:
        tiles = [(TILE, _named(piece.tiles, plan)) for piece in pieces]
        both = [tile if piece.tiles else (TAG, tags[piece.tile]) for tile, piece in zip(tiles, pieces)]
        return tuple(one for one in both if one[1])

    return Example(plan, tags, named(placed.stream), named(placed.cross))


def _named(tiles: Sequence[int], plan: TilePlan) -> str:
    """The tiles of a piece, by their numbers from 1."""
    if len(tiles) > 1:
        return f"{tiles[0] + 1} to {tiles[-1] + 1}"
    return str(tiles[0] + 1) if tiles and tiles[0] < plan.num_regular else "thumbnail"


def _histograms(total: Tally) -> list[Histogram]:
    values = [(title, unit, total.spread(name)) for name, title, unit in _HISTOGRAMS]
    return [histogram(*one) for one in values if any(one[2])]


@cache
def _templates() -> jinja2.Environment:
    templates = environment("nvlm.inspect")
    templates.filters |= {"number": "{:,}".format, "percent": percent, "ordinal": ordinal, "bands": bands}
    templates.filters |= {"fitted": fitted, "tile_name": tile_name, "query_name": query_name}
    templates.filters["lines"] = lambda text: text.split("\n")
    return templates


def percent(share: float) -> str:
    """A share in words: never 0% or 100% of what is only almost so."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.1%}".replace(".0%", "%")


def bands(boxes: Sequence[Box]) -> list[tuple[str, int]]:
    """(kind, tokens) of the stretches of a stream, in order; each tile is one of its own."""
    found: list[tuple[str, int]] = []
    for box in boxes:
        if found and found[-1][0] == box.kind != TILE:
            found[-1] = (box.kind, found[-1][1] + box.count)
        else:
            found.append((box.kind, box.count))
    return found


def fitted(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """`size` in px scaled to at most `width` x `height`, and enlarged at most three times."""
    scale = min(width / size[0], height / size[1], 3)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def tile_name(one: Shown, image: int, tile: int) -> str:
    """A tile of one of the record's images, or a frame of a video, in words."""
    regular = one.tiles[image] - 1
    name = f"tile {tile + 1}" if tile < regular else ("thumbnail" if regular else "whole picture")
    name = f"frame {tile + 1}" if one.videos[image] else name
    return f"{name} of picture {image + 1}" if len(one.tiles) > 1 else name


def query_name(one: Shown, stretch: Stretch) -> str:
    """Tokens of the text stream in words, by what they see."""
    if stretch.before_images:
        return "text before the first picture"
    if stretch.bound:
        return f"tag of {tile_name(one, stretch.image, stretch.tile)}"
    picture = f"picture {stretch.image + 1}" if len(one.tiles) > 1 else "the picture"
    return f"thumbnail of {picture} and the text after it" if stretch.tiles else f"text after {picture}"


def ordinal(number: int) -> str:
    """2nd, 3rd, 4th, ..."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"
