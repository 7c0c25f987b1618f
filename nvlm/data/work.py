"""Counts the work in a batch: tokens without padding, tiles, keys, and visible pairs."""

from __future__ import annotations

import torch

from nvlm.data.amounts import Work
from nvlm.data.batch import ALL_TILES, OF_LATEST, PAD, Batch


def count_work(batch: Batch) -> Work:
    """The work of all rows, without padding."""
    real = batch.sample != PAD
    tokens = int(real.sum())
    return Work(
        tokens=tokens,
        pairs=int((batch.positions[real] + 1).sum()),  # causal within each sample
        outputs=batch.num_trained,
        tiles=len(batch.tile_tokens),
        projected=sum(len(batch.sources_of(rows)) for rows in (batch.stream_rows, batch.cross_rows)),
        keys=int((batch.cross_sample != PAD).sum()),
        cross_pairs=_cross_pairs(batch),
    )


def _cross_pairs(batch: Batch) -> int:
    """The number of pairs that nvlm.attention.visibility.visible allows, without enumerating them."""
    keys = (batch.cross_sample != PAD).nonzero(as_tuple=True)
    queries = ((batch.sample != PAD) & (batch.image != PAD)).nonzero(as_tuple=True)
    if not len(keys[0]) or not len(queries[0]):
        return 0
    stream, cross = (batch.sample, batch.image, batch.tile), (batch.cross_sample, batch.cross_image, batch.cross_tile)
    sizes = [1 + max(int(q[queries].max()), int(k[keys].max())) for q, k in zip(stream, cross)]
    of_tile = batch.sample.new_zeros(len(batch.sample), *sizes)  # keys by row, sample, image, tile
    places = (keys[0], *(numbers[keys] for numbers in cross))
    of_tile.index_put_(places, torch.ones_like(keys[0]), accumulate=True)
    of_image = of_tile.sum(-1)
    row, (sample, image, tile) = queries[0], (numbers[queries] for numbers in stream)
    own = torch.where(tile == OF_LATEST, of_image[row, sample, image], of_tile[row, sample, image, tile.clamp(min=0)])
    return int(torch.where(tile == ALL_TILES, of_image.cumsum(-1)[row, sample, image], own).sum())
