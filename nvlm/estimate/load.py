"""The work of a replica's step, with one sample representing all.

The sample is one image with `tiles` regular tiles, thumbnail and tags, or one video of `frames` frames, and text, all
of it with labels. By default it is an image with the maximum number of tiles, and its text is as long as
data.seq_length allows. Rows take as many such samples as fit. Lengths are as computed, including padding.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvlm.config.values import Config
from nvlm.data.amounts import Work
from nvlm.estimate.lengths import place, plan_of, sample_work

if TYPE_CHECKING:
    from nvlm.data.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A micro-batch of one replica, and the number of them in a step."""

    work: Work  # of a micro-batch: real tokens, tiles and keys
    rows: int
    length: int  # columns per row
    keys: int  # per row
    stream_from_tiles: int  # tile tokens in the text streams of a micro-batch
    keys_from_tiles: int
    micro_batches: int
    each: int  # samples in a full micro-batch
    samples: int  # in a replica's step

    @property
    def tokens(self) -> int:
        """Number of positions in a micro-batch's text streams."""
        return self.rows * self.length

    @property
    def tiles(self) -> int:
        """Number of tiles in a replica's step."""
        return self.work.tiles * self.micro_batches


def step_load(
    config: Config, replicas: int, tiles: int | None = None, text: int | None = None, frames: int = 0
) -> Load:
    """The load of each of `replicas`.

    `tiles`, `text`: regular tiles and text tokens per sample; None: the most. `frames`: a video instead of an image.
    """
    data, p = config.data, config.parallel
    plan = plan_of(config, config.tiling.max_tiles if tiles is None else tiles, frames)
    if text is None:
        image = sample_work(config, 0, plan).tokens
        longest = min(data.seq_length, data.row_length)  # rows may be shorter than the longest sample
        text = max((longest if longest > image else data.seq_length) - image, 1)
    sample = sample_work(config, text, plan)
    a_row = max(1, data.row_length // sample.tokens)
    if sample.keys:
        a_row = max(1, min(a_row, data.cross_length // sample.keys))
    samples = math.ceil(config.train.global_batch / replicas)
    all_rows = math.ceil(samples / a_row)
    rows = min(config.train.micro_batch, all_rows)
    micro_batches = math.ceil(all_rows / rows)
    if p.virtual > 1:  # interleaved schedules need a multiple
        micro_batches = math.ceil(micro_batches / p.pipeline) * p.pipeline
    each = rows * min(a_row, samples)
    stream, keys = place(config, plan).from_tiles if plan else (0, 0)
    return Load(
        work=Work(**{f.name: each * getattr(sample, f.name) for f in dataclasses.fields(Work)}),
        rows=rows,
        length=config.padded_length or _up(min(a_row, samples) * sample.tokens, config.row_multiple),
        keys=_up(min(a_row, samples) * sample.keys, config.row_multiple),
        stream_from_tiles=each * stream,
        keys_from_tiles=each * keys,
        micro_batches=micro_batches,
        each=each,
        samples=samples,
    )


def batch_load(batch: Batch, work: Work) -> Load:
    """The load of a step that is this one micro-batch; `work`: as counted by nvlm.data.work."""
    rows, length = batch.tokens.shape
    return Load(
        work=work,
        rows=rows,
        length=length,
        keys=batch.cross_tokens.shape[1],
        stream_from_tiles=len(batch.tiles_of(batch.stream_rows)),
        keys_from_tiles=len(batch.tiles_of(batch.cross_rows)),
        micro_batches=1,
        each=sum(map(len, batch.ids)),
        samples=sum(map(len, batch.ids)),
    )


def _up(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple
