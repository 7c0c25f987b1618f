"""The vision pre-pass with tiles of different numbers of tokens: each process gets the features that it uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm.arch.pipeline import tile_use_of_rank
from nvlm.commands.compose import compose_config
from nvlm.data.outline import build_processor, outline
from nvlm.data.pack import collate
from nvlm.data.record import Record
from nvlm.data.samples import Share, fill
from nvlm.processes import groups
from nvlm.tiling.placement import Piece, Placement, TileTokens, Words
from nvlm.vision.prepass import BalancedVision, build_team
from tests.dist.run import joined, run_distributed


def uneven(plan, tags, tokens):
    """NVLM-H with tiles of one to five tokens."""
    counts, last = tuple(1 + (3 * t) % 5 for t in range(plan.num_tiles)), plan.num_regular
    tiles = [Piece(t, TileTokens(counts[t])) for t in range(plan.num_tiles)]
    return Placement(counts, (Piece(last, Words(tags[last])), tiles[last]), tuple(tiles[:last]))


def batch_of(config, replica, number, decoded):
    """One row of two samples; all pictures of all replicas differ. The second replica has many more tiles.

    `decoded`: whether each rank of a replica has only the picture of the sample that falls to its seat.
    """
    processor = build_processor(config, uneven)
    samples = []
    for name in range(2):
        noise = np.random.default_rng((replica, number, name))
        size = (120, 360, 3) if replica or name else (100, 100, 3)
        picture = Image.fromarray(noise.integers(0, 255, size, dtype=np.uint8))
        talk = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "Yes."}]
        record = Record(f"{replica}.{number}.{name}", talk, [picture])
        seat, seats = groups.seat()
        share = Share((name % seats,), seat) if decoded else None
        samples.append(fill(record, outline(record, processor), processor, share))
    return collate([samples], config.vision.tile_size, config.row_multiple)


def features_of(tile, count):
    """[count, 4] that no other tile has."""
    return tile.double().sum() + torch.arange(count * 4, dtype=torch.float64).view(count, 4)


class Encoder:
    """Gives each tile the features above, as many as its data says."""

    def __init__(self, batches):
        tiles = [pair for batch in batches for pair in zip(batch.pixels, batch.tile_tokens.tolist())]
        self.counts = {float(tile.double().sum()): count for tile, count in tiles}
        self.encoded = 0

    def features(self, pixels, tokens):
        self.encoded += len(pixels)
        assert tokens.tolist() == [self.counts[float(tile.double().sum())] for tile in pixels]
        parts = [features_of(*pair) for pair in zip(pixels, tokens.tolist())]
        return torch.cat([torch.zeros(0, 4, dtype=torch.float64), *parts])


def exchanged(decoded, overrides):
    """(tiles encoded here, tiles used here) and whether all features of them are the right ones."""
    config = compose_config("arch=hybrid", "data.seq_length=512", *overrides)
    with joined(config):
        replica, replicas = groups.data_rank()
        every = [[batch_of(config, r, number, False) for number in range(3)] for r in range(replicas)]
        use = tile_use_of_rank(config, groups.pipeline_rank())
        encoder = Encoder([batch for batches in every for batch in batches])
        vision = BalancedVision(encoder, build_team(use, config.vision.balance))
        used = 0
        own = [batch_of(config, replica, number, decoded) for number in range(3)]
        for whole, batch in zip(every[replica], vision.encode(own), strict=True):
            right = torch.cat([features_of(*pair) for pair in zip(whole.pixels, whole.tile_tokens.tolist())])
            for rows, uses in ((batch.stream_rows, use.stream), (batch.cross_rows, use.keys)):
                if uses:
                    assert torch.equal(batch.features_of(rows), right[rows])
                    used += len(batch.tiles_of(rows).unique())
        return encoder.encoded, used, use


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor=2",),
        ("parallel.pipeline=2", "llm.layers=4"),
        ("parallel.data=2", "vision.balance=replica"),
        ("parallel.data=2", "vision.balance=global"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("decoded", [False, True], ids=["pixels everywhere", "pixels shared"])
def test_features_of_uneven_tiles_reach_who_uses_them(layout, decoded):
    results = run_distributed(exchanged, 2, decoded, layout)
    encoded = [tiles for tiles, _, _ in results]
    everything = 3 * (1 + 4) + (3 * (4 + 4) if "parallel.data=2" in layout else 0)
    assert sum(encoded) == everything
    assert max(encoded) - min(encoded) <= 1 or "vision.balance=replica" in layout
    assert all(used for _, used, use in results if use.stream)
