"""The contracts between data and model: Sample, Batch. A record before it is encoded is in nvlm.data.record.

Shapes: B packed rows, S text-stream length, X keys per row in cross-attention, T tiles, K tokens per tile,
C feature width after pixel shuffle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORE = -100  # label: no loss here
IMAGE = -1  # token id: one tile token stands here
PAD = -1  # sample, image and tile numbers of padding; image number of text before any image
ALL_TILES = -1  # tile number of a query that sees every tile of the images before it


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded conversation, before packing. All tensors but `pixels` are int64."""

    id: str
    tokens: Tensor  # [S], IMAGE at placeholders
    labels: Tensor  # [S], the target of the logits at each position, IGNORE without loss
    image: Tensor  # [S], number of the last image begun, PAD before the first
    tile: Tensor  # [S], the one tile that the token sees, or ALL_TILES
    stream_tiles: Tensor  # tiles that fill the placeholders, in order
    cross_tokens: Tensor  # [X], tag ids, IMAGE where a tile token stands
    cross_image: Tensor  # [X]
    cross_tile: Tensor  # [X]
    cross_tiles: Tensor  # tiles that fill the keys, in order
    cross_tags: tuple[tuple[int, ...], ...]  # tag ids of each tile in cross_tiles
    pixels: Tensor  # uint8 [T, 3, px, px]


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows. Rows hold whole samples; `sample` tells them apart."""

    ids: tuple[tuple[str, ...], ...]  # sample ids by row
    tokens: Tensor  # [B, S]
    labels: Tensor  # [B, S]
    positions: Tensor  # [B, S], from 0 in each sample
    sample: Tensor  # [B, S], number of the sample within its row, PAD at padding
    image: Tensor  # [B, S], number of the last image begun within the sample
    tile: Tensor  # [B, S]
    stream_tiles: Tensor  # tile numbers for the placeholders, row by row
    stream_owners: Tensor  # [tiles in stream_tiles, 2], (row, sample in it)
    place: Tensor  # [B, S], where in the run the token stands (see `places_of`), the same in every layout
    cross_tokens: Tensor  # [B, X]
    cross_place: Tensor  # [B, X], the same for keys
    cross_sample: Tensor  # [B, X]
    cross_image: Tensor  # [B, X]
    cross_tile: Tensor  # [B, X]
    cross_tiles: Tensor  # tile numbers for the IMAGE keys, row by row
    cross_owners: Tensor  # [tiles in cross_tiles, 2], (row, sample in it)
    cross_tags: Tensor  # [tiles in cross_tiles, longest tag], tag ids, PAD behind
    pixels: Tensor  # uint8 [T, 3, px, px]
    features: Tensor | None = None  # [n, K, C], from the frozen encoder: the tiles that this process uses
    feature_rows: Tensor | None = None  # [T], each tile's row in `features`, PAD where it is not used here; on the CPU
    host: Batch | None = None  # where this one is on another device: the same in the CPU's memory

    @property
    def on_host(self) -> Batch:
        """The same batch on the CPU: what is asked of its numbers there does not wait for a GPU's queue."""
        if self.host is None:
            return self
        assert self.host.tokens.shape == self.tokens.shape, "a batch was changed, but not its counterpart on the host"
        return self.host

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        if torch.device(device) == self.tokens.device:
            return self
        values = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "feature_rows")
        moved = {name: x.to(device, non_blocking=True) for name, x in values if torch.is_tensor(x)}
        return replace(self, host=self.on_host, **moved)

    def with_features(self, features_TKC: Tensor) -> Batch:
        """The same batch with all its tiles encoded."""
        return replace(self, features=features_TKC, feature_rows=torch.arange(len(features_TKC), device="cpu"))

    def with_some_features(self, features_nKC: Tensor, rows_T: Tensor) -> Batch:
        """The same batch with features of some tiles: `rows_T`, on the CPU, gives each tile's row, PAD for none."""
        return replace(self, features=features_nKC, feature_rows=rows_T)

    def rows_of(self, tiles: Tensor) -> Tensor:
        """Rows [n], on the CPU, that the tile numbers `tiles` [n] have in `features`."""
        assert self.features is not None and self.feature_rows is not None, "the tiles are not encoded yet"
        rows = self.feature_rows[tiles.cpu()]
        assert bool((rows != PAD).all()), "features of a tile that this process was not to receive"
        return rows

    def features_of(self, tiles: Tensor) -> Tensor:
        """Features [n, K, C] of the tile numbers `tiles` [n]."""
        return self.features[self.rows_of(tiles).to(self.features.device, non_blocking=True)]

    @property
    def num_tokens(self) -> int:
        """Real (not padding) positions of the text stream."""
        return int((self.sample != PAD).sum())

    @property
    def num_trained(self) -> int:
        """Positions that carry loss."""
        return int((self.labels != IGNORE).sum())


def places_of(step: int, rows_B: Sequence[int], length: int) -> Tensor:
    """Places [B, `length`] of the columns of the rows `rows_B`, counted over all replicas, of step `step`: room for
    2^23 steps, 2^16 rows and 2^24 columns in 63 bits."""
    rows = torch.tensor(rows_B)
    assert step < 1 << 23 and int(rows.max()) < 1 << 16 and length <= 1 << 24
    return ((step << 16) + rows[:, None] << 24) + torch.arange(length)


def in_line(batch: Batch) -> Batch:
    """`batch` as one row, its rows one behind the other with their padding: no token sees more or less."""
    counts = torch.tensor([0, *(len(row) for row in batch.ids)], device="cpu")
    first_B = counts.cumsum(0)[:-1].to(batch.tokens.device, non_blocking=True)  # the number of each row's first sample

    def numbered(sample_BS: Tensor) -> Tensor:
        return torch.where(sample_BS == PAD, PAD, sample_BS + first_B[:, None]).view(1, -1)

    def owned(owners: Tensor) -> Tensor:
        return torch.stack((torch.zeros_like(owners[:, 0]), owners[:, 1] + first_B[owners[:, 0]]), dim=1)

    flat = (
        *("tokens", "labels", "positions", "image", "tile", "place"),
        *("cross_tokens", "cross_image", "cross_tile", "cross_place"),
    )
    return replace(
        batch,
        ids=(tuple(name for row in batch.ids for name in row),),
        sample=numbered(batch.sample),
        cross_sample=numbered(batch.cross_sample),
        stream_owners=owned(batch.stream_owners),
        cross_owners=owned(batch.cross_owners),
        host=None if batch.host is None else in_line(batch.host),
        **{name: getattr(batch, name).reshape(1, -1) for name in flat},
    )


def without_padding(batch: Batch, multiple: int) -> tuple[Batch, Tensor]:
    """`batch` as one row of its T real tokens and of so much padding that `multiple` divides T; and where each stood,
    [T], counted row behind row."""
    line = in_line(batch)
    padding = line.on_host.sample[0] == PAD
    real = (~padding).nonzero()[:, 0]
    spare = -len(real) % multiple if len(real) else multiple
    columns_T = torch.cat((real, padding.nonzero()[:spare, 0]))
    host = None if line.host is None else _columns_of(line.host, columns_T)
    columns_T = columns_T.to(line.tokens.device, non_blocking=True)
    return replace(_columns_of(line, columns_T), host=host), columns_T


def _columns_of(line: Batch, columns_T: Tensor) -> Batch:
    along = ("tokens", "labels", "positions", "sample", "image", "tile", "place")
    return replace(line, **{name: getattr(line, name)[:, columns_T] for name in along})


def check_placeholders(batch: Batch, tile_tokens: int) -> None:
    """Raise ValueError with the sample's id and both counts where placeholders and tile tokens do not match."""
    if batch.features is not None and batch.features.shape[1] != tile_tokens:
        # Filling would take the surplus for the next tile's tokens without a word.
        names = ", ".join(name for row in batch.ids for name in row)
        raise ValueError(
            f"features of samples [{names}]: got {batch.features.shape[1]} tokens a tile, "
            f"expected {tile_tokens}. Fix: the encoder and vision.tile_size, patch and downsample disagree"
        )
    batch = batch.on_host
    for place, tokens, sample, tiles, owners in (
        ("text stream", batch.tokens, batch.sample, batch.stream_tiles, batch.stream_owners),
        ("cross-attended keys", batch.cross_tokens, batch.cross_sample, batch.cross_tiles, batch.cross_owners),
    ):
        if len(tiles) != len(owners):
            raise ValueError(f"{place}: got {len(tiles)} tiles, expected {len(owners)}. Fix: the loader lost some")
        places = (tokens == IMAGE).nonzero()
        # One row a placeholder or tile token: (row, sample in it).
        found = torch.stack((places[:, 0], sample[places[:, 0], places[:, 1]]), dim=1)
        difference = _count(found, batch) - tile_tokens * _count(owners, batch)
        if difference.any():
            row, number = difference.nonzero()[0].tolist()
            got = int(_count(found, batch)[row, number])
            name = batch.ids[row][number] if number < len(batch.ids[row]) else "padding"
            raise ValueError(
                f"{place} of sample {name}: got {got} image placeholders, expected "
                f"{got - int(difference[row, number])} ({tile_tokens} tokens a tile). "
                f"Fix: the tile plan and the encoded text disagree"
            )


def _count(owners: Tensor, batch: Batch) -> Tensor:
    """How often each (row, sample) stands in `owners` [n, 2]: [B, most samples in a row + 1], padding last."""
    counts = owners.new_zeros(len(batch.tokens), max((len(row) for row in batch.ids), default=0) + 1)
    ones = torch.ones_like(owners[:, 0])
    return counts.index_put((owners[:, 0], owners[:, 1]), ones, accumulate=True)
