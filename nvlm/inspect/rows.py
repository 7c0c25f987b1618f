"""How the records of one step are packed into rows, for each replica."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nvlm.data.loader import Planned, Steps


@dataclass(frozen=True, slots=True)
class Row:
    """A packed row: its samples, and the lengths in text tokens and keys to which its micro-batch is padded."""

    samples: tuple[Planned, ...]
    padded: tuple[int, int]

    @property
    def used(self) -> tuple[int, int]:
        """Text tokens and keys without padding."""
        lengths = [sample.lengths for sample in self.samples]
        return sum(text for text, _ in lengths), sum(keys for _, keys in lengths)


@dataclass(frozen=True, slots=True)
class Packed:
    """One step. `replicas`: of each replica, its micro-batches of rows."""

    step: int
    replicas: tuple[tuple[tuple[Row, ...], ...], ...]
    skipped: int

    @property
    def rows(self) -> list[Row]:
        """The rows of all replicas."""
        return [row for replica in self.replicas for batch in replica for row in batch]

    @property
    def padding(self) -> tuple[float, float]:
        """The share of padding in the text stream and in the keys; 0 if they are empty."""
        return self._padding(0), self._padding(1)

    def _padding(self, which: int) -> float:
        used = sum(row.used[which] for row in self.rows)
        return 1 - used / sum(row.padded[which] for row in self.rows) if used else 0.0


def packed(steps: Steps, step: int = 0) -> Packed:
    """The rows of `step` (from 0)."""
    plan, hands = steps.planned(step)
    replicas = tuple(
        tuple(_padded(batch, steps.multiple) for batch in steps.micro_batches([plan.rows[n] for n in hand]))
        for hand in hands
    )
    return Packed(step, replicas, len(plan.skipped))


def _padded(rows: list[tuple[Planned, ...]], multiple: int) -> tuple[Row, ...]:
    """The rows of a micro-batch, all padded to the longest, as `nvlm.data.pack.collate` does."""
    found = [Row(row, (0, 0)) for row in rows]
    longest = [max((row.used[which] for row in found), default=0) for which in (0, 1)]
    text, keys = (multiple * max(1, math.ceil(length / multiple)) for length in longest)
    return tuple(Row(row.samples, (text, keys)) for row in found)
