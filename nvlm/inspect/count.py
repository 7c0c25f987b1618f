"""Counts what records become: tokens, tiles, and the reasons why some cannot be used. Imports no torch.

Nothing is kept for each record: numbers are added up, and lengths and sizes are counted by value.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain, islice

from nvlm.data.outline import Outline, Processor, outline
from nvlm.data.plans import wanted_plans
from nvlm.data.record import BadRecord, Record, TooLong, one_record
from nvlm.data.stills import check_pixels

SPREADS = ("length", "text", "keys", "tiles", "width", "height")  # what is counted by value
FAULTS = 20  # named per source
_REASONS = 200  # different ones per source; further ones are counted together
_OTHERS = "other reasons"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What the inspected records of a source are, and what they become. All but `records`, `bad`, `too_long`, `reasons`
    and `faults` concern usable records. Counters count records or images by value."""

    records: int = 0
    bad: int = 0
    too_long: int = 0  # of the bad ones: longer than the sequence or the keys allow
    fewer_tiles: int = 0  # records whose images got fewer tiles, so that they fit
    cut: int = 0  # documents of which only the beginning fits
    without_images: int = 0
    images: int = 0
    tiles: int = 0  # with thumbnails
    tiles_lost: int = 0  # that tiling.max_tiles would have allowed
    text: int = 0  # tokens of the text stream that are no tile tokens: words, tags and the chat format
    learned: int = 0  # tokens with a label
    stream: int = 0  # tile tokens in the text stream
    keys: int = 0  # cross-attended tokens
    by_length: Counter = field(default_factory=Counter)  # tokens of the text stream, by record
    by_text: Counter = field(default_factory=Counter)
    by_keys: Counter = field(default_factory=Counter)
    by_tiles: Counter = field(default_factory=Counter)
    by_width: Counter = field(default_factory=Counter)  # px, by image
    by_height: Counter = field(default_factory=Counter)
    by_grid: Counter = field(default_factory=Counter)  # (columns, rows), by image
    reasons: Counter = field(default_factory=Counter)  # without names and numbers
    faults: tuple[tuple[str, str], ...] = ()  # (name, reason) of the first bad records

    @property
    def usable(self) -> int:
        """The number of usable records."""
        return self.records - self.bad

    @property
    def bad_share(self) -> float:
        """The share of bad records."""
        return self.bad / self.records if self.records else 0.0

    def spread(self, name: str) -> Counter:
        """One of SPREADS."""
        return getattr(self, f"by_{name}")


_COUNTERS = frozenset(each.name for each in fields(Tally) if each.default_factory is Counter)


def added(tallies: Sequence[Tally]) -> Tally:
    """The sum; of reasons and faults, a limited number is kept."""
    values = {each.name: [getattr(tally, each.name) for tally in tallies] for each in fields(Tally)}
    faults = tuple(islice(chain.from_iterable(values.pop("faults")), FAULTS))
    totals = {name: _together(found) if name in _COUNTERS else sum(found) for name, found in values.items()}
    common = totals["reasons"].most_common()
    totals["reasons"] = Counter(dict(common[:_REASONS]))
    if rest := sum(count for _, count in common[_REASONS:]):
        totals["reasons"][_OTHERS] += rest
    return Tally(faults=faults, **totals)


def _together(counters: Sequence[Counter]) -> Counter:
    total: Counter = Counter()
    for counter in counters:
        total.update(counter)
    return total


def measure(name: str, read: Callable[[], Record], processor: Processor, pixels: bool) -> Tally:
    """One record's tally. With `pixels`, its images are decoded, otherwise only their headers are read."""
    try:
        with one_record():
            record = read()
            sketch = outline(record, processor)
            for picture, size in zip(record.images, sketch.pictures.sizes) if pixels else ():
                check_pixels(picture, size, processor.max_pixels, processor.video)
        return of_outline(sketch, processor)
    except BadRecord as reason:
        return Tally(
            records=1,
            bad=1,
            too_long=int(isinstance(reason, TooLong)),
            reasons=Counter([kind_of(str(reason))]),
            faults=((name, str(reason)),),
        )


def of_outline(sketch: Outline, processor: Processor) -> Tally:
    """The tally of a usable record."""
    pictures, (length, keys) = sketch.pictures, sketch.lengths
    stream = sum(piece.length for placement in sketch.placements for piece in placement.stream if piece.tiles)
    tiles = sum(plan.num_tiles for plan in pictures.plans)
    wanted = sum(plan.num_tiles for plan in wanted_plans(pictures.sizes, processor))
    return Tally(
        records=1,
        fewer_tiles=int(pictures.fewer_tiles),
        cut=int(sketch.cut),
        without_images=int(not pictures.plans),
        images=len(pictures.plans),
        tiles=tiles,
        tiles_lost=wanted - tiles,
        text=length - stream,
        learned=learned(sketch),
        stream=stream,
        keys=keys,
        by_length=Counter([length]),
        by_text=Counter([length - stream]),
        by_keys=Counter([keys]),
        by_tiles=Counter([tiles]),
        by_width=Counter(size[0] for size in pictures.sizes),
        by_height=Counter(size[1] for size in pictures.sizes),
        by_grid=Counter((plan.cols, plan.rows) for plan in pictures.plans),
    )


def learned(sketch: Outline) -> int:
    """The number of labels: of tokens with loss, all but one at the very start, which nothing predicts."""
    first = next((run for run in sketch.runs if run.ids or run.image is not None), None)
    return sum(len(run.ids) for run in sketch.runs if run.trained) - int(first is not None and first.trained)


def kind_of(reason: str) -> str:
    """A reason without the names of files and without numbers, so that equal faults are counted together."""
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"^\S+\.\w{2,5}: ", "FILE: ", reason))
