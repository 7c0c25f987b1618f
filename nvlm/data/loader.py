"""Steps of packed micro-batches. What a step holds is a function of (seed, step) alone, so a resumed run, also on
another number of data-parallel replicas, sees the same samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch.utils.data import DataLoader, Dataset

from nvlm.batch import BadRecord, Batch
from nvlm.data.encode import Encoder, encode
from nvlm.data.pack import collate, pack
from nvlm.data.sources import Records


@dataclass(frozen=True, slots=True)
class StepData:
    """One optimizer step's data of one replica: its micro-batches, and the records it had to skip."""

    micro_batches: tuple[Batch, ...]
    records: int
    skipped: tuple[tuple[str, str], ...]  # (name, reason)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def step_records(seed: int, step: int, global_batch: int, count: int) -> list[int]:
    """Indices of the records of `step` (from 0): epochs are permutations, one behind the other."""
    numbers = range(step * global_batch, (step + 1) * global_batch)
    return [int(_permutation(seed, n // count, count)[n % count]) for n in numbers]


@dataclass(frozen=True)
class Steps(Dataset):
    """Map-style: index = step."""

    records: Records
    encoder: Encoder
    seed: int
    steps: int
    global_batch: int
    micro_batch: int  # packed rows
    row_length: int  # tokens
    data_rank: int
    data_size: int
    multiple: int = 8  # row lengths are multiples of this many tokens

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> StepData:
        mine = step_records(self.seed, step, self.global_batch, len(self.records))[self.data_rank :: self.data_size]
        samples, skipped = [], []
        for index in mine:
            try:
                samples.append(encode(self.records[index], self.encoder))
            except BadRecord as reason:
                skipped.append((self.records.name(index), str(reason)))
        lengths = [(s.tokens.numel(), s.cross_tokens.numel()) for s in samples]
        rows = [[samples[i] for i in row] for row in pack(lengths, self.row_length, self.encoder.cross_length)]
        groups = [rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch)] or [[]]
        batches = tuple(collate(group, self.encoder.tile_size, self.multiple) for group in groups)
        return StepData(batches, len(mine), tuple(skipped))


def load_steps(steps: Steps, first: int, workers: int) -> Iterator[StepData]:
    """Steps `first`, `first` + 1, ... to the end, prepared by `workers` processes (0: in this one)."""
    return iter(
        DataLoader(
            steps,
            batch_size=None,
            sampler=range(first, len(steps)),
            num_workers=workers,
            prefetch_factor=2 if workers else None,
        )
    )
