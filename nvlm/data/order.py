"""Which records each step draws, as a pure function of (seed, step). Imports no torch.

Epochs of a source are permutations, computed index by index: nothing is kept for each record, so 10^9 records cost no
more memory than ten. Sources of a blend are drawn in exact proportion, by stride scheduling: draw j of a source with
share w has the time (j + 1/2) / w, and all draws are made in order of time. The draws of a step are then permuted, so
that rows do not inherit the fixed pattern of sources.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from nvlm.config.fields import Take

_ROUNDS_PER_BIT = 6  # of swap-or-not, as in the bound of its paper


def permuted(indices: np.ndarray, count: int, keys: Sequence[int]) -> np.ndarray:
    """Where a pseudorandom permutation of 0 ... `count` - 1, chosen by `keys`, sends `indices`.

    Swap-or-not (Hoang, Morris, Rogaway, CRYPTO 2012): in each round, an index and its mirror image around a random
    centre are swapped or not, by a random bit that both share. It is a permutation of any number of elements.
    """
    at = np.asarray(indices, dtype=np.uint64)
    size = np.uint64(count)
    for key in np.random.SeedSequence(list(keys)).generate_state(_ROUNDS_PER_BIT * count.bit_length(), np.uint64):
        mirrored = (key % size + size - at) % size
        swap = _hash(np.maximum(at, mirrored) ^ key) & np.uint64(1)
        at = np.where(swap == 1, mirrored, at)
    return at.astype(np.int64)


def _hash(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def taken(take: str, count: int) -> int:
    """How many of `count` records `take` leaves: all, or first:N, last:N or random:N (a number or a percentage)."""
    match = Take.FORM.fullmatch(take)
    if match is None:
        return count
    amount = match[2]
    return min(count, max(1, round(count * float(amount[:-1]) / 100)) if amount.endswith("%") else int(amount))


@dataclass(frozen=True, slots=True)
class Drawn:
    """A source as an order sees it: its name ("" if it is the only one), number of records, which of them are used
    (`nvlm.config.fields.Take`), and its share of all draws."""

    name: str
    records: int
    share: float = 1.0
    take: str = "all"

    @property
    def used(self) -> int:
        """The number of different records that are drawn."""
        return taken(self.take, self.records)

    def index(self, draws: np.ndarray, seed: int) -> np.ndarray:
        """The record of each of this source's draws, which are numbered from 0."""
        used, key = self.used, int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8])
        epochs, places = np.divmod(draws, used)
        found = np.empty_like(draws)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = permuted(places[here], used, (seed, key, int(epoch)))
        if self.take.startswith("last"):
            return found + (self.records - used)
        return permuted(found, self.records, (seed, key)) if self.take.startswith("random") else found


@dataclass(frozen=True)
class Order:
    """The records of every step. `global_batch`: records per step of all replicas; `by_step`: each step draws from one
    source. Records of all sources are numbered through, source by source."""

    seed: int
    global_batch: int
    sources: tuple[Drawn, ...]
    by_step: bool = False

    def source_of(self, step: int) -> int | None:
        """The number of the only source that `step` draws from; None if it draws from all."""
        return int(scheduled(self._shares, step, 1)[0][0]) if self.by_step else None

    def source(self, record: int) -> int:
        """The number of the source that holds `record`."""
        return bisect_right(self._ends, record)

    def step(self, step: int) -> list[int]:
        """The numbers of the records of `step` (from 0), of all replicas."""
        numbers, draws = self._draws(step)
        indices = np.empty_like(draws)
        starts = (0, *self._ends)
        for number in np.unique(numbers):
            here = numbers == number
            indices[here] = starts[number] + self.sources[number].index(draws[here], self.seed)
        mixed = permuted(np.arange(self.global_batch), self.global_batch, (self.seed, step))
        return indices[mixed].tolist()

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(accumulate(source.records for source in self.sources))

    @cached_property
    def _shares(self) -> tuple[float, ...]:
        return tuple(source.share for source in self.sources)

    def _draws(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """For each record of `step`, the number of its source and the number of that source's draw."""
        if not self.by_step:
            return scheduled(self._shares, step * self.global_batch, self.global_batch)
        numbers, turns = scheduled(self._shares, step, 1)
        draws = turns * self.global_batch + np.arange(self.global_batch)
        return np.broadcast_to(numbers, draws.shape), draws


def scheduled(shares: Sequence[float], first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of the draws `first` ... `first` + `count` - 1 of a blend: the number of its source, and how often that
    source was drawn before. `shares` sum to 1."""
    share_K = np.asarray(shares, dtype=np.float64)
    # Until time t, source k was drawn t * share_k times, rounded: t times in all, give or take half the sources.
    begin_K, end_K = (_drawn_before(time, share_K) for time in (first - len(shares), first + count + len(shares)))
    number = np.repeat(np.arange(len(shares)), end_K - begin_K)
    draw = np.concatenate([np.arange(begin, end) for begin, end in zip(begin_K, end_K)])
    order = np.lexsort((number, (draw + 0.5) / share_K[number]))
    chosen = order[first - int(begin_K.sum()) :][:count]
    return number[chosen], draw[chosen]


def _drawn_before(time: float, share_K: np.ndarray) -> np.ndarray:
    """How many draws of each source have a time below `time`."""
    count_K = np.maximum(np.ceil(time * share_K - 0.5), 0)
    # The product is rounded, so it is corrected by the comparison that sorts the draws.
    count_K += (count_K + 0.5) / share_K < time
    count_K -= (count_K > 0) & ((count_K - 0.5) / share_K >= time)
    return count_K.astype(np.int64)
