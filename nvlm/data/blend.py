"""A blend: the records of several sources as one sequence, and the order in which they are drawn. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path

import numpy as np

from nvlm.config.data import Blend, Source
from nvlm.data.order import Drawn, Order, taken
from nvlm.data.record import BadRecord, Record
from nvlm.data.sources.rows import find


class Blended:
    """The records of all sources, source by source; `texts`: the names of those that may have no image."""

    def __init__(self, parts: Mapping[str, Sequence[Record]], texts: frozenset[str] = frozenset()) -> None:
        self.parts, self.texts = parts, texts
        self._names = tuple(parts)
        self._ends = tuple(accumulate(map(len, parts.values())))

    @property
    def files(self) -> Sequence[Path]:
        """The files of all sources."""
        return tuple(chain.from_iterable(part.files for part in self.parts.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        name, place = self._find(index)
        record = self.parts[name][place]
        if name in self.texts:
            check_text_only(name, len(record.images))
        return record

    def name(self, index: int) -> str:
        """The record's name in its source, behind the source's."""
        source, place = self._find(index)
        return f"{source}/{self.parts[source].name(place)}"

    def kind(self, index: int) -> str:
        """The name of the source, so that scores are by source."""
        return self._find(index)[0]

    def _find(self, index: int) -> tuple[str, int]:
        number, place = find(self._ends, index)
        return self._names[number], place


def check_text_only(name: str, images: int) -> None:
    """Raise BadRecord if a record of the source `name`, which may have no image, has some."""
    if images:
        raise BadRecord(f"{images} images, but data.sources.{name}.text_only=true")


class Interleaved:
    """The records of a blend in an order in which any first part of them has all sources in proportion."""

    def __init__(self, records: Blended) -> None:
        self.records = records
        times = [(np.arange(len(part)) + 0.5) / len(part) for part in records.parts.values()]
        self.order = np.argsort(np.concatenate(times), kind="stable")

    @property
    def files(self) -> Sequence[Path]:
        """The files of all sources."""
        return self.records.files

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Record:
        return self.records[int(self.order[index])]

    def name(self, index: int) -> str:
        """The record's name."""
        return self.records.name(int(self.order[index]))

    def kind(self, index: int) -> str:
        """The name of its source."""
        return self.records.kind(int(self.order[index]))


def build_order(source: Source, records: Sequence[Record], seed: int, global_batch: int) -> Order:
    """The order in which the `records` of `source` are drawn."""
    if not isinstance(records, Blended):
        return Order(seed, global_batch, (Drawn("", len(records), take=_take(source)),))
    counts = {name: len(part) for name, part in records.parts.items()}
    shares = shares_of(source, counts)
    drawn = tuple(Drawn(name, counts[name], shares[name], _take(part.source)) for name, part in source.sources.items())
    return Order(seed, global_batch, drawn, source.mixing == "steps")


def shares_of(blend: Blend, counts: Mapping[str, int]) -> dict[str, float]:
    """Each source's share of all draws, given its number of records. They sum to 1.

    A source with `epochs` has its number of records, that often, as its weight.
    """
    weights = {
        name: part.weight or part.epochs * taken(_take(part.source), counts[name])
        for name, part in blend.sources.items()
    }
    # Lists, not sets: sums of floats depend on the order, and that of a set differs between processes.
    texts = [name for name, part in blend.sources.items() if part.text_only]
    others = [name for name in weights if name not in texts]
    groups = [(others, 1 - blend.text_share), (texts, blend.text_share)] if blend.text_share else []
    shares = {}
    for names, share in groups or [(list(weights), 1.0)]:
        total = sum(weights[name] for name in names)
        shares |= {name: share * weights[name] / total for name in names}
    return {name: shares[name] for name in weights}


def _take(source: Source) -> str:
    return getattr(source, "take", "all")  # the built-in pages have no such key
