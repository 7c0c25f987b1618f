"""Walks through the records of every source, in several processes, and adds up what they become."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from nvlm.data.ahead import in_processes
from nvlm.data.order import Drawn, Order
from nvlm.data.outline import Processor
from nvlm.data.sources.registry import Records
from nvlm.inspect.count import Tally, added, measure

_CHUNK = 64  # records that a process reads at a time; tallies that are added at a time


@dataclass(frozen=True)
class Survey(Dataset):
    """The records to inspect, in chunks. `most`: records per source, the first that a run would draw; None: all.
    `pixels`: images are decoded."""

    records: Records
    processor: Processor
    order: Order
    most: int | None = None
    pixels: bool = False

    @functools.cached_property
    def chunks(self) -> list[tuple[int, range]]:
        """The number of a source, and of some of its draws."""
        draws = [(number, self.draws(source)) for number, source in enumerate(self.order.sources)]
        return [(n, range(i, min(i + _CHUNK, count))) for n, count in draws for i in range(0, count, _CHUNK)]

    def draws(self, source: Drawn) -> int:
        """How many records of `source` are inspected."""
        return source.used if self.most is None else min(self.most, source.used)

    def indices(self, number: int, draws: range) -> list[int]:
        """The records of these draws of source `number`; in the order of the files, if all of them are inspected."""
        source = self.order.sources[number]
        first = sum(one.records for one in self.order.sources[:number])
        if self.draws(source) == source.used and not source.take.startswith("random"):
            start = source.records - source.used if source.take.startswith("last") else 0
            return [first + start + draw for draw in draws]
        return sorted(first + int(index) for index in source.index(np.arange(draws.start, draws.stop), self.order.seed))

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, chunk: int) -> tuple[int, Tally]:
        number, draws = self.chunks[chunk]
        found = [
            measure(
                self.records.name(index),
                functools.partial(self.records.__getitem__, index),
                self.processor,
                self.pixels,
            )
            for index in self.indices(number, draws)
        ]
        return number, added(found)


def tallied(survey: Survey, workers: int, progress: Callable[[int, int], None]) -> dict[str, Tally]:
    """The tally of each source, by name. `progress`: called with the number of a source and of records done."""
    found: list[list[Tally]] = [[] for _ in survey.order.sources]
    for number, tally in in_processes(survey, workers):
        found[number].append(tally)
        if len(found[number]) == _CHUNK:
            found[number] = [added(found[number])]
        progress(number, tally.records)
    return {source.name: added(tallies) for source, tallies in zip(survey.order.sources, found)}
