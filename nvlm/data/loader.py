"""Steps of packed micro-batches. The contents of a step depend only on (seed, step), so a resumed run sees the same
samples, even with another number of data-parallel replicas.

The records of a window of steps are packed together. Packing needs only lengths, so text is tokenised and tiles are
planned from image headers. Pixels are read when a step needs them, and cut as planned."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from torch.utils.data import Dataset

from nvlm.config.values import Config
from nvlm.data.ahead import in_processes
from nvlm.data.amounts import Work
from nvlm.data.batch import Batch, Sample
from nvlm.data.blend import build_order
from nvlm.data.index.opened import PREPARE, Index, open_records
from nvlm.data.measure import lengths
from nvlm.data.order import Order
from nvlm.data.outline import Processor, build_processor, outline, unreadable
from nvlm.data.pack import collate, deal, hand_out, pack
from nvlm.data.parcel import Parcel, close
from nvlm.data.plans import Pictures
from nvlm.data.record import BadRecord, DataChanged, ImageChanged, one_record
from nvlm.data.samples import Share, blank, fill
from nvlm.data.share import decoding_seats
from nvlm.data.sources.registry import Records
from nvlm.data.work import count_work
from nvlm.tiling.placement import PlacementRule

_FIX = "do not change records or images while a run reads them"


@dataclass(frozen=True, slots=True)
class Failed:
    """A record that was packed, but could not be decoded. `number`: its sample's, over all micro-batches of a step."""

    number: int
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class StepData:
    """One replica's data for one optimizer step: its micro-batches and the records that were skipped.

    `failed`: records that are in the micro-batches, but were found to be broken by this rank. The ranks of a replica
    decode different images, so they must first agree on these, and then all call `without`.
    `changed`: why this rank has no data for the step: records or images changed. All ranks of the replica must end.
    `fewer_tiles`: records whose images got fewer tiles than tiling.max_tiles allows, so that they fit.
    """

    micro_batches: tuple[Batch, ...]
    records: int
    skipped: tuple[tuple[str, str], ...]  # (name, reason)
    work: Work  # of all micro-batches
    fewer_tiles: int = 0
    failed: tuple[Failed, ...] = ()
    changed: str | None = None

    def without(self, failed: Sequence[Failed]) -> StepData:
        """The same step, with no loss on the `failed` records, which count as skipped."""
        batches, first = [], 0
        for batch in self.micro_batches:
            count = sum(map(len, batch.ids))
            here = [one.number - first for one in failed if first <= one.number < first + count]
            batches.append(batch.without_loss(here) if here else batch)
            first += count
        skipped = (*self.skipped, *((one.name, one.reason) for one in failed))
        work = sum(map(count_work, batches), Work()) if failed else self.work
        return replace(self, micro_batches=tuple(batches), skipped=skipped, work=work, failed=())


@dataclass(frozen=True, slots=True)
class Planned:
    """A record, its lengths in text tokens and cross-attended tokens, and the tile plans of its images."""

    index: int
    source: int  # the number of its source in the order
    lengths: tuple[int, int]
    pictures: Pictures


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step of all replicas together: its rows, longest first, and the records already known to be bad."""

    rows: tuple[tuple[Planned, ...], ...]
    skipped: tuple[tuple[str, str], ...]  # (name, reason)


@dataclass(frozen=True)
class Steps(Dataset):
    """All steps as a map-style dataset whose index is the step."""

    records: Records
    processor: Processor
    order: Order
    steps: int
    micro_batch: int  # packed rows
    row_length: int  # tokens
    data_rank: int = 0
    data_size: int = 1
    multiple: int = 8  # row lengths are multiples of this many tokens
    window: int = 1  # steps whose records are packed together
    groups: int = 1  # the number of micro-batches is a multiple of this
    ends: tuple[int, ...] = ()  # former values of `steps` of a run that was extended
    seat: int = 0  # this process's rank within the replica
    seats: int = 1  # ranks of the replica, among which a step's images are divided
    index: Index | None = None  # of the records
    length: int | None = None  # tokens that all rows are padded to; None: the longest of their micro-batch
    even: bool = False  # without `length`, the longest of the step, so that all micro-batches have one length

    def __len__(self) -> int:
        return self.steps

    def window_of(self, step: int) -> range:
        """The steps whose records are packed with those of `step`. The run's end cuts the last window short. It stays
        short if the run is extended later, so that no record is repeated or left out."""
        first = step // self.window * self.window
        last = min(first + self.window, self.steps)
        cuts = [first, *sorted(end for end in self.ends if first < end < last), last]
        at = bisect_right(cuts, step)
        return range(cuts[at - 1], cuts[at])

    def planned(self, step: int) -> tuple[StepPlan, list[list[int]]]:
        """The plan of `step`, and the numbers of its rows that each replica gets."""
        window = self.window_of(step)
        plan = plan_window(self, window)[step - window.start]
        kinds = [[one.source for one in row] for row in plan.rows]
        return plan, hand_out(kinds, self.data_size, self.order.seed, step)

    def __getitem__(self, step: int) -> StepData:
        plan, hands = self.planned(step)
        mine = hands[self.data_rank]
        planned = [plan.rows[number] for number in mine]
        skipped = plan.skipped[self.data_rank :: self.data_size]
        every = [one for row in planned for one in row]
        dealt = decoding_seats([one.pictures for one in every], self.seats)
        failed: list[Failed] = []
        decoded = [
            self._decode(number, one, Share(dealt[number], self.seat), failed) for number, one in enumerate(every)
        ]
        samples = iter(decoded)
        rows = [(number, [next(samples) for _ in row]) for number, row in zip(mine, planned, strict=True)]
        length = self._length(planned)
        batches = tuple(self._collate(step, part, length) for part in self.micro_batches(rows))
        return StepData(
            batches,
            records=len(every) + len(skipped),
            skipped=tuple(skipped),
            work=sum(map(count_work, batches), Work()),
            fewer_tiles=sum(one.pictures.fewer_tiles for one in every),
            failed=tuple(failed),
        )

    def delivered(self, step: int) -> StepData:
        """The step; if this rank finds that records or images changed, one without data that says so to the others."""
        try:
            return self[step]
        except DataChanged as error:
            return StepData((), records=0, skipped=(), work=Work(), changed=str(error))

    @property
    def _fix(self) -> str:
        # An index is only compared with the files of records, so preparing it again would keep what it says of images.
        stale = f"; if they changed before it, remove the folder of data.index, then {PREPARE}" if self.index else ""
        return f"Fix: {_FIX}{stale}"

    def _decode(self, number: int, planned: Planned, share: Share, failed: list[Failed]) -> Sample:
        """The sample of a record. If it cannot be read or decoded, it is added to `failed`, and its tiles are blank."""
        sketch = None
        try:
            with one_record():
                record = self.records[planned.index]
                sketch = outline(record, self.processor, pictures=planned.pictures)
                sample = fill(record, sketch, self.processor, share)
        except ImageChanged as error:
            raise DataChanged(f"sample {self.records.name(planned.index)}: {error}. {self._fix}") from error
        except BadRecord as reason:
            name = self.records.name(planned.index)
            failed.append(Failed(number, name, str(reason)))
            sketch = sketch or unreadable(planned.lengths, planned.pictures, self.processor)
            sample = blank(name, sketch, self.processor, share)
        got = (sample.tokens.numel(), sample.cross_tokens.numel())
        if got != planned.lengths:
            raise DataChanged(
                f"sample {sample.id}: got {got[0]} text tokens and {got[1]} cross-attended ones, expected "
                f"{planned.lengths[0]} and {planned.lengths[1]} as measured for packing. {self._fix}"
            )
        return sample

    def _length(self, rows: Sequence[Sequence[Planned]]) -> int | None:
        """Tokens that a step's rows are padded to; None: the longest of their micro-batch."""
        if self.length is not None or not self.even:
            return self.length
        longest = max((sum(one.lengths[0] for one in row) for row in rows), default=0)
        return max(1, math.ceil(longest / self.multiple)) * self.multiple

    def _collate(self, step: int, rows: Sequence[tuple[int, list[Sample]]], length: int | None) -> Batch:
        samples, numbers = [row for _, row in rows], [number for number, _ in rows]
        return collate(samples, self.processor.tile_size, self.multiple, step=step, numbers=numbers, length=length)

    def micro_batches(self, rows: list) -> list[list]:
        """Groups of `rows`, at least one; the last ones may be short or empty."""
        count = max(1, math.ceil(len(rows) / self.micro_batch))
        count = math.ceil(count / self.groups) * self.groups
        return [rows[i * self.micro_batch : (i + 1) * self.micro_batch] for i in range(count)]


def steps_of(config: Config, placement: PlacementRule) -> Steps:
    """The steps of a run with a single rank. Raises ConfigError if its records or their index cannot be opened."""
    processor = build_processor(config, placement)
    records, index = open_records(config.data, config.seed, processor)
    return Steps(
        records=records,
        index=index,
        order=build_order(config.data.source, records, config.seed, config.train.global_batch),
        processor=processor,
        steps=config.train.steps,
        micro_batch=config.train.micro_batch,
        row_length=config.data.row_length,
        window=config.data.window,
        multiple=config.row_multiple,
        length=config.padded_length,
        even=config.parallel.pipeline > 1,  # or stages would have to tell one another
        groups=config.parallel.pipeline if config.parallel.virtual > 1 else 1,  # interleaved stages take turns
    )


@lru_cache(maxsize=2)
def plan_window(steps: Steps, numbers: range) -> tuple[StepPlan, ...]:
    """Plans of the steps `numbers`, which form a window; the same on all replicas."""
    plans: dict[int, StepPlan] = {}
    for together in _packed_together(steps.order, numbers):
        measured = [_measure(steps, steps.order.step(step)) for step in together]
        good = [planned for found, _ in measured for planned in found]
        # Every step gets a row if there are enough: a step without one learns nothing.
        rows = pack(
            [planned.lengths for planned in good],
            steps.row_length,
            steps.processor.cross_length,
            at_least=len(together),
        )
        seed = (steps.order.seed, together[0] // steps.window, len(together))
        hands = deal([tuple(good[i] for i in row) for row in rows], len(together), seed)
        plans |= {step: StepPlan(tuple(hand), bad) for step, hand, (_, bad) in zip(together, hands, measured)}
    return tuple(plans[step] for step in numbers)


def _packed_together(order: Order, numbers: range) -> list[list[int]]:
    """The steps of a window in groups whose records may share rows: all of them, or those with the same source."""
    groups: dict[int | None, list[int]] = {}
    for step in numbers:
        groups.setdefault(order.source_of(step), []).append(step)
    return list(groups.values())


def _measure(steps: Steps, indices: Sequence[int]) -> tuple[list[Planned], tuple[tuple[str, str], ...]]:
    """The records that can be packed, and (name, reason) for the others."""
    good, bad = [], []
    for index in indices:
        try:
            with one_record():
                found = _lengths(steps, index)
            good.append(Planned(index, steps.order.source(index), *found))
        except BadRecord as reason:
            bad.append((steps.records.name(index), str(reason)))
    return good, tuple(bad)


def _lengths(steps: Steps, record: int) -> tuple[tuple[int, int], Pictures]:
    if steps.index is not None:
        return lengths(steps.index.measure(record), steps.processor)
    found = outline(steps.records[record], steps.processor)
    return found.lengths, found.pictures


@dataclass(frozen=True)
class _Delivered(Dataset):
    """The steps as their ranks must get them."""

    steps: Steps

    def __getitem__(self, step: int) -> StepData:
        return self.steps.delivered(step)


def load_steps(steps: Steps, first: int, workers: int, pinned: bool = False) -> Iterator[StepData]:
    """Steps `first`, `first` + 1, ... up to the end, prepared by `workers` processes (0: in this process).

    `pinned`: in page-locked memory, for a GPU.
    """
    order = range(first, len(steps))
    found = in_processes(_Delivered(steps), workers, sampler=order, collate_fn=close, pin_memory=pinned)
    return map(Parcel.opened, found)  # workers start now, not with the first step that is asked for
