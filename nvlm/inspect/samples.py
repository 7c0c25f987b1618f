"""The records that the page shows: each as the model will get it, with its pictures and its boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nvlm.data.batch import IGNORE
from nvlm.data.messages import DOCUMENT, Turn
from nvlm.data.order import Order
from nvlm.data.outline import Processor, outline, turns_of
from nvlm.data.record import BadRecord, Record, one_record
from nvlm.data.samples import fill
from nvlm.data.sources.registry import Records
from nvlm.inspect.pictures import Picture, pictures
from nvlm.inspect.sight import Sight, sight
from nvlm.inspect.stream import Box, boxes, key_boxes
from nvlm.tiling.frames import FramePlan

_TRIED = 20  # for each that is shown, so that different shapes are among them


@dataclass(frozen=True, slots=True)
class Shown:
    """One record. `id`: its own, if it has one, else its name in its source; `labels`: tokens with a label; `hidden`:
    images that are not shown."""

    name: str
    id: str
    lengths: tuple[int, int]
    labels: int
    boxes: tuple[Box, ...]  # of the text stream
    keys: tuple[Box, ...]
    tiles: tuple[int, ...]  # of each image, or frames of each video
    videos: tuple[bool, ...]  # whether each of them is a video
    pictures: tuple[Picture, ...]
    hidden: int
    fewer_tiles: bool
    cut: bool
    sight: Sight


def chosen(records: Records, order: Order, processor: Processor, count: int) -> Iterator[Shown]:
    """Up to `count` records, of all sources in turn: the first that the run draws, those before others whose images
    have other grids. Records that cannot be used are left out: they are counted elsewhere."""
    each = -(-count // len(order.sources))
    starts = np.cumsum([0, *(source.records for source in order.sources)])
    found = []
    for source, start in zip(order.sources, starts):
        draws = np.arange(min(source.used, _TRIED * each))
        indices = [int(start + index) for index in source.index(draws, order.seed)]
        found.append(_different(records, indices, processor, each))
    turns = [index for place in range(each) for indices in found for index in indices[place : place + 1]]
    for index in turns[:count]:
        try:
            with one_record():
                yield _shown(records[index], records.name(index), processor)
        except BadRecord:
            continue


def _different(records: Records, indices: list[int], processor: Processor, count: int) -> list[int]:
    """`count` of the `indices` whose records can be used: first one of each shape, then second ones."""
    seen: Counter = Counter()
    ranked = []
    for place, index in enumerate(indices):
        try:
            with one_record():
                plans = outline(records[index], processor).pictures.plans
        except BadRecord:
            continue
        ranked.append((seen[plans], place, index))
        seen[plans] += 1
    return [index for _, _, index in sorted(ranked)[:count]]


def _shown(record: Record, name: str, processor: Processor) -> Shown:
    sketch = outline(record, processor)
    sample = fill(record, sketch, processor)
    found = pictures(record, sketch.pictures.plans, sample.pixels, processor)
    return Shown(
        name=name,
        id=record.id,
        lengths=sketch.lengths,
        labels=int((sample.labels != IGNORE).sum()),
        boxes=tuple(boxes(sketch, all_turns(record, processor), processor.tokenizer)),
        keys=tuple(key_boxes(sketch, processor.tokenizer)),
        tiles=tuple(plan.num_tiles for plan in sketch.pictures.plans),
        videos=tuple(isinstance(plan, FramePlan) for plan in sketch.pictures.plans),
        pictures=tuple(found),
        hidden=len(sketch.placements) - len(found),
        fewer_tiles=sketch.pictures.fewer_tiles,
        cut=sketch.cut,
        sight=sight(sample),
    )


def all_turns(record: Record, processor: Processor) -> list[Turn]:
    """The turns of `record`, after the configuration's system message, if the record has none of its own."""
    turns = turns_of(record, processor)
    own = turns[0].role in ("system", DOCUMENT)
    return turns if own or not processor.system else [Turn("system", (processor.system,)), *turns]
