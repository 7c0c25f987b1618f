"""The contracts between data and model: Sample, Batch. For records before encoding, see nvlm.data.record.

Tiles may have any number of tokens. Everything computed from tiles is flat: the tokens of all tiles of a sample or
batch are concatenated, and tile t has the rows offsets[t] to offsets[t + 1], where offsets are the cumulative sums of
`tile_tokens`. Placeholders are filled by row number: `stream_rows` gives the row for each placeholder in the text
stream, `cross_rows` for each one among the keys; ROW_END means the learned vector at the end of a row of a feature map.
Rows from N on are mixed tokens: number N + m is made of the four projected tile tokens with the rows `mixed_rows[m]`,
as their sum with `mixed_weights[m]`, or as the largest of them in each channel.

The ranks of a replica have the same samples, but each decodes only some of their images. `holder` names the seat (the
rank within the replica) that has the pixels of each tile; everything else is the same on all of them.

Shapes: B packed rows, S text-stream length, X cross-attended keys per row, T tiles, t of them here, N tokens of all T
tiles, C feature width, P pieces of the keys that show tiles, M mixed tokens, n any number (different in each field).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from nvlm.processes.device import to_device

IGNORE = -100  # label: no loss at this position
IMAGE = -1  # token id: placeholder of one tile token
PAD = -1  # sample, image and tile numbers of padding; image number of text before any image
ROW_END = -2  # row number of the end of a map's row, which is filled by no tile token
ALL_TILES = -1  # tile number of a query that sees every tile of the images before it
OF_LATEST = -2  # tile number of a query that sees every tile of the latest image before it
EVERYWHERE = -1  # holder of a tile whose pixels are on every rank of the replica


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded conversation, before packing. Tensors are int64, unless said."""

    id: str
    tokens: Tensor  # [S], IMAGE at placeholders
    labels: Tensor  # [S], the target of the logits at each position, IGNORE without loss
    image: Tensor  # [S], number of the latest image so far, PAD before the first
    tile: Tensor  # [S], the only tile that the token sees, ALL_TILES or OF_LATEST
    stream_rows: Tensor  # [n], the row (of the sample's N) that fills each placeholder, in order
    cross_tokens: Tensor  # [X], tag ids, IMAGE at tile tokens
    cross_image: Tensor  # [X]
    cross_tile: Tensor  # [X]
    cross_rows: Tensor  # [n], the row (of the sample's N) that fills each IMAGE key, in order
    cross_lengths: tuple[int, ...]  # [P], number of IMAGE keys of each piece
    cross_tags: tuple[tuple[int, ...], ...]  # [P], tag ids of each piece
    mixed_rows: Tensor  # [M, 4], the rows (below N) that each mixed token is made of
    mixed_weights: Tensor  # fp32 [M, 4]
    mixed_largest: Tensor  # bool [M], whether the largest counts, not the weighted sum
    tile_tokens: Tensor  # [T], tokens of each tile; their sum is N
    holder: Tensor  # [T], the seat that has the pixels of each tile, or EVERYWHERE
    pixels: Tensor  # uint8 [t, 3, px, px], of the tiles that are here


# Index tensors stay on the CPU, so that reading them never synchronises with the GPU.
_ON_CPU = (
    *("stream_rows", "stream_counts", "cross_rows", "cross_counts", "cross_lengths", "tile_tokens"),
    *("holder", "feature_rows", "mixed_rows", "mixed_weights", "mixed_largest"),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows. Rows hold whole samples; `sample` tells them apart."""

    ids: tuple[tuple[str, ...], ...]  # sample ids by row
    tokens: Tensor  # [B, S]
    labels: Tensor  # [B, S]
    positions: Tensor  # [B, S], starting at 0 in each sample
    sample: Tensor  # [B, S], number of the sample within its row, PAD at padding
    image: Tensor  # [B, S], number of the latest image so far in the sample
    tile: Tensor  # [B, S]
    stream_rows: Tensor  # [n], the row (of N) that fills each placeholder, row by row; on the CPU
    stream_counts: Tensor  # number of placeholders of each sample, in the order of `ids`; on the CPU
    place: Tensor  # [B, S], unique place of the token in the run (see `places_of`), the same in every layout
    cross_tokens: Tensor  # [B, X]
    cross_place: Tensor  # [B, X], the same for keys
    cross_sample: Tensor  # [B, X]
    cross_image: Tensor  # [B, X]
    cross_tile: Tensor  # [B, X]
    cross_rows: Tensor  # [n], the row (of N) that fills each IMAGE key, row by row; on the CPU
    cross_counts: Tensor  # number of IMAGE keys of each sample, in the order of `ids`; on the CPU
    cross_lengths: Tensor  # [P], number of IMAGE keys of each piece; on the CPU
    cross_tags: Tensor  # [P, longest tag], tag ids, padded with PAD
    mixed_rows: Tensor  # [M, 4], the rows (of N) that each mixed token is made of; on the CPU
    mixed_weights: Tensor  # fp32 [M, 4]; on the CPU
    mixed_largest: Tensor  # bool [M], whether the largest counts, not the weighted sum; on the CPU
    tile_tokens: Tensor  # [T], tokens of each tile; their sum is N; on the CPU
    holder: Tensor  # [T], the seat that has the pixels of each tile, or EVERYWHERE; on the CPU
    pixels: Tensor  # uint8 [t, 3, px, px], of the tiles that are here
    features: Tensor | None = None  # [n, C], from the encoder: the tokens of the tiles that this process uses
    feature_rows: Tensor | None = None  # [N], row of each token in `features`, PAD if not used here; on the CPU
    host: Batch | None = None  # the same batch on the CPU, if this one is on another device

    @property
    def on_host(self) -> Batch:
        """The same batch on the CPU: reading its values does not synchronise with the GPU."""
        if self.host is None:
            return self
        assert self.host.tokens.shape == self.tokens.shape, "a batch was changed, but not its copy on the host"
        return self.host

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        place = torch.device(device)
        if place == self.tokens.device:
            return self
        moved = {name: to_device(x, place) for name, x in self._moving().items()}
        return replace(self, host=self.on_host, **moved)

    def pin_memory(self) -> Batch:
        """The same batch with the tensors that `to` moves in page-locked memory, from which a GPU copies while the CPU
        goes on. Needs a GPU."""
        return replace(self, **{name: x.pin_memory() for name, x in self._moving().items()})

    def _moving(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _ON_CPU}
        return {name: x for name, x in values.items() if torch.is_tensor(x)}

    def without_loss(self, samples: Sequence[int]) -> Batch:
        """The same batch with no loss on these samples, numbered in the order of `ids`."""
        first_B = torch.tensor([0, *(len(row) for row in self.ids)][:-1]).cumsum(0)
        among_BS = torch.isin(self.sample + first_B[:, None], torch.tensor(samples)) & (self.sample != PAD)
        return replace(self, labels=self.labels.masked_fill(among_BS, IGNORE))

    def with_features(self, features_NC: Tensor) -> Batch:
        """The same batch with all its tiles encoded."""
        return replace(self, features=features_NC, feature_rows=torch.arange(len(features_NC), device="cpu"))

    def with_some_features(self, features_nC: Tensor, rows_N: Tensor) -> Batch:
        """The same batch with some tiles encoded: `rows_N`, on the CPU, is each token's row, or PAD if it has none."""
        return replace(self, features=features_nC, feature_rows=rows_N)

    def features_of(self, rows_n: Tensor) -> Tensor:
        """Features [n, C] of the tile tokens `rows_n` (numbers below N, on the CPU)."""
        assert self.features is not None and self.feature_rows is not None, "the tiles are not encoded yet"
        assert not bool((rows_n == ROW_END).any()), "the end of a map's row has no feature"
        here_n = self.feature_rows[rows_n]
        assert bool((here_n != PAD).all()), "features of a tile that was not sent to this process"
        return self.features.index_select(0, to_device(here_n, self.features.device))

    def sources_of(self, rows_n: Tensor) -> Tensor:
        """The rows (below N) of the tile tokens that the placeholders with row numbers `rows_n` are made of: each once
        if some are mixed; on the CPU."""
        tokens = int(self.tile_tokens.sum())
        mixed = rows_n >= tokens
        own = rows_n[(rows_n != ROW_END) & ~mixed]
        return torch.cat((own, self.mixed_rows[rows_n[mixed] - tokens].flatten())).unique() if mixed.any() else own

    def tiles_of(self, rows_n: Tensor) -> Tensor:
        """The tile of each of the tile tokens `sources_of(rows_n)`; on the CPU."""
        return torch.repeat_interleave(self.tile_tokens)[self.sources_of(rows_n)]

    @property
    def num_tokens(self) -> int:
        """Number of positions in the text stream, without padding."""
        return int((self.sample != PAD).sum())

    @property
    def num_trained(self) -> int:
        """Number of positions with loss."""
        return int((self.labels != IGNORE).sum())


def places_of(step: int, rows_B: Sequence[int], length: int) -> Tensor:
    """Places [B, `length`]: one unique number for each step, row (counted over all replicas) and column.

    63 bits hold 2^23 steps, 2^16 rows and 2^24 columns.
    """
    rows = torch.tensor(rows_B)
    assert step < 1 << 23 and int(rows.max()) < 1 << 16 and length <= 1 << 24
    return ((step << 16) + rows[:, None] << 24) + torch.arange(length)


def in_line(batch: Batch) -> Batch:
    """`batch` with its rows, including padding, concatenated into one; visibility does not change."""
    counts = torch.tensor([0, *(len(row) for row in batch.ids)], device="cpu")
    first_B = to_device(counts.cumsum(0)[:-1], batch.tokens.device)  # the number of each row's first sample

    def numbered(sample_BS: Tensor) -> Tensor:
        return torch.where(sample_BS == PAD, PAD, sample_BS + first_B[:, None]).view(1, -1)

    flat = (
        *("tokens", "labels", "positions", "image", "tile", "place"),
        *("cross_tokens", "cross_image", "cross_tile", "cross_place"),
    )
    return replace(
        batch,
        ids=(tuple(name for row in batch.ids for name in row),),
        sample=numbered(batch.sample),
        cross_sample=numbered(batch.cross_sample),
        host=None if batch.host is None else in_line(batch.host),
        **{name: getattr(batch, name).reshape(1, -1) for name in flat},
    )


def without_padding(batch: Batch, multiple: int) -> tuple[Batch, Tensor]:
    """`batch` as one row without padding, but for what makes T a multiple of `multiple`; and each token's original flat
    index [T]."""
    line = in_line(batch)
    padding = line.on_host.sample[0] == PAD
    real = (~padding).nonzero()[:, 0]
    spare = -len(real) % multiple if len(real) else multiple
    columns_T = torch.cat((real, padding.nonzero()[:spare, 0]))
    host = None if line.host is None else _columns_of(line.host, columns_T)
    columns_T = to_device(columns_T, line.tokens.device)
    return replace(_columns_of(line, columns_T), host=host), columns_T


def _columns_of(line: Batch, columns_T: Tensor) -> Batch:
    along = ("tokens", "labels", "positions", "sample", "image", "tile", "place")
    return replace(line, **{name: getattr(line, name)[:, columns_T] for name in along})


def check_placeholders(batch: Batch) -> None:
    """Raise ValueError, with the sample's id and both counts, if placeholders and tile tokens do not match."""
    names = [name for row in batch.ids for name in row]
    tokens = int(batch.tile_tokens.sum())
    if batch.feature_rows is not None and len(batch.feature_rows) != tokens:
        # Filling would silently take the surplus for tokens of the next tile.
        raise ValueError(
            f"features of samples [{', '.join(names)}]: got {len(batch.feature_rows)} tokens, expected {tokens} for "
            f"{len(batch.tile_tokens)} tiles. Fix: the encoder and vision.tile_size, patch, downsample, pool disagree"
        )
    host = batch.on_host
    for place, columns, rows, counts in (
        ("text stream", (host.tokens, host.sample), batch.stream_rows, batch.stream_counts),
        ("cross-attended keys", (host.cross_tokens, host.cross_sample), batch.cross_rows, batch.cross_counts),
    ):
        if len(rows) != int(counts.sum()):
            raise ValueError(f"{place}: got {len(rows)} tile tokens, expected {int(counts.sum())}. Fix: the loader")
        found, expected = _placeholders(batch.ids, *columns), torch.nn.functional.pad(counts, (0, 1))
        for number in (found != expected).nonzero()[:1, 0].tolist():
            name = names[number] if number < len(names) else "padding"
            raise ValueError(
                f"{place} of sample {name}: got {int(found[number])} image placeholders, expected "
                f"{int(expected[number])} as its tiles have tokens. Fix: the tile plan and the encoded text disagree"
            )


def _placeholders(ids: Sequence[Sequence[str]], tokens_BL: Tensor, sample_BL: Tensor) -> Tensor:
    """Number of placeholders of each sample, in the order of `ids`, then of those in padding; on the CPU."""
    counts = torch.tensor([0, *(len(row) for row in ids)], device="cpu").cumsum(0)
    places = (tokens_BL == IMAGE).nonzero()
    numbers = sample_BL[places[:, 0], places[:, 1]].cpu()
    numbers = torch.where(numbers == PAD, counts[-1], numbers + counts[places[:, 0].cpu()])
    return numbers.bincount(minlength=int(counts[-1]) + 1)
