"""Batches of questions, read while the model answers the ones before them.

`data.workers` processes read them, as in training; without any, a thread does, which shares the interpreter with the
model. Pictures are decoded and resized there, which takes a large part of an evaluation's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from torch.utils.data import Dataset

from nvlm.config.values import Config
from nvlm.data.ahead import in_processes
from nvlm.data.batch import Batch
from nvlm.data.outline import Processor
from nvlm.data.pack import collate
from nvlm.data.parcel import close_batch, open_batch
from nvlm.evaluate.asking import Asked, Unasked, asked
from nvlm.evaluate.order import Prompt
from nvlm.evaluate.score import Row
from nvlm.evaluate.tasks import Task


@dataclass(frozen=True, slots=True)
class Read:
    """Questions as they are read. `rows`: (number, line without an answer) of each row of `batch`, which is None if
    there are none; `unasked`: (number, line) of those that could not be read."""

    rows: tuple[tuple[int, Row], ...]
    unasked: tuple[tuple[int, Row], ...]
    batch: Batch | None


@dataclass(frozen=True, slots=True)
class Reader(Dataset):
    """The batches `waiting` of a task, read when they are asked for by their place."""

    task: Task
    processor: Processor
    waiting: Sequence[Sequence[Prompt]]
    multiple: int

    def __len__(self) -> int:
        return len(self.waiting)

    def __getitem__(self, place: int) -> Read:
        found = [(one.index, asked(self.task, one.index, self.processor)) for one in self.waiting[place]]
        fit = [(index, one) for index, one in found if isinstance(one, Asked)]
        samples = [[one.sample] for _, one in fit]
        return Read(
            rows=tuple((index, one.row("")) for index, one in fit),
            unasked=tuple((index, one.row()) for index, one in found if isinstance(one, Unasked)),
            batch=collate(samples, self.processor.tile_size, self.multiple) if samples else None,
        )


def read_ahead(reader: Reader, config: Config) -> Iterator[Read]:
    """The batches of `reader` in turn, by `config.data.workers` processes or by a thread."""
    if not config.data.workers:
        return _ahead(reader.__getitem__, range(len(reader)))
    found = in_processes(reader, config.data.workers, sampler=range(len(reader)), collate_fn=_closed)
    return map(_opened, found)


def _ahead[Place, Item](read: Callable[[Place], Item], places: Iterable[Place]) -> Iterator[Item]:
    """`read` of each place, in a thread that is one ahead. Nothing else may read from the same files."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = None
        for place in places:
            before, coming = coming, pool.submit(read, place)
            if before is not None:
                yield before.result()
        if coming is not None:
            yield coming.result()


def _closed(read: Read) -> Read:
    """For the way from a worker."""
    return replace(read, batch=read.batch and close_batch(read.batch))


def _opened(read: Read) -> Read:
    return replace(read, batch=read.batch and open_batch(read.batch))
