"""The vision pre-pass: before the pipeline runs, every rank encodes an even share of a step's tiles.

So the encoder is not part of the first pipeline stage, where it would stall the others. The tiles of a step's
micro-batches are distributed over the ranks of the replica (with vision.balance=global, of all replicas), and each rank
then receives the features of the tiles that its stage uses. If the encoder learns, their gradients go the same way back
(nvlm.vision.back), and each rank encodes its tiles once more, with gradients.

A rank is identified by its replica and its seat (its rank within the replica). If the tiles of all replicas are dealt
to the seats in turn, no seat gets more than one tile more than another; these numbers are each seat's share of its
replica's tiles. A rank encodes the tiles that its own loader decoded, and only what exceeds its share goes to ranks of
the replica that have too few. Among the ranks with one seat, one in each replica, tiles then stay in their replica as
far as an even share allows. So pixels move only if they must, and the numbers of tiles on any two ranks differ by at
most one.

Tiles may have different numbers of tokens, which are known from the data. Pixels are exchanged by tile, features by
token, and the numbers of tokens are sent with the pixels.

Shapes: T tiles, t of them here, N tokens of all T tiles, n of some, C feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nvlm.data.batch import EVERYWHERE, PAD, Batch
from nvlm.processes import groups
from nvlm.processes.device import to_device
from nvlm.tiling.placement import TileUse
from nvlm.vision.back import Leaf, Way, gradients, with_leaf
from nvlm.vision.exchange import Trip, exchange, token_rows
from nvlm.vision.path import VisionPath


def seat_counts(counts: Sequence[int], seats: int, seat: int) -> list[int]:
    """How many tiles of each replica are assigned to `seat`; `counts` are tiles per replica."""
    starts = [sum(counts[:r]) for r in range(len(counts))]
    return [len(range((seat - start) % seats, count, seats)) for start, count in zip(starts, counts)]


def encoding_seats(holders: Sequence[int], room: Sequence[int]) -> list[int]:
    """The seat that encodes each tile: the one that holds its pixels as long as it has room, else the first with room.

    `room`: the number of tiles that each seat encodes, as many in total as there are holders.
    """
    left, found = list(room), []
    for holder in holders:
        stays = holder != EVERYWHERE and left[holder] > 0
        found.append(holder if stays else None)
        if stays:
            left[holder] -= 1
    spare = iter([seat for seat, count in enumerate(left) for _ in range(count)])
    return [next(spare) if seat is None else seat for seat in found]


def spread(own: Sequence[int]) -> list[list[int]]:
    """How many tiles each replica sends to each, [from][to], so that their counts differ by at most one afterwards.

    `own`: tiles per replica before. Tiles that need not move stay.
    """
    share, rest = divmod(sum(own), len(own))
    largest_first = sorted(range(len(own)), key=lambda r: (-own[r], r))
    room = {r: share + (place < rest) for place, r in enumerate(largest_first)}
    sent = [[0] * len(own) for _ in own]
    for r, count in enumerate(own):
        sent[r][r] = min(count, room[r])
        room[r] -= sent[r][r]
    for source, count in enumerate(own):
        left = count - sent[source][source]
        for target in range(len(own)):
            moved = min(left, room[target]) if target != source else 0
            sent[source][target] += moved
            room[target] -= moved
            left -= moved
    return sent


def shares(counts: Sequence[int], seats: int, balance: str) -> list[int]:
    """The number of tiles that each rank of all replicas encodes; `counts` are tiles per replica before balancing."""
    if balance != "global":
        return [own for count in counts for seat in range(seats) for own in seat_counts([count], seats, seat)]
    columns = (spread(seat_counts(counts, seats, seat)) for seat in range(seats))
    return [sum(received) for sent in columns for received in zip(*sent)]


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks that encode together, from the point of view of one rank."""

    replica: dist.ProcessGroup
    uses: tuple[TileUse, ...]  # of each seat
    across: dist.ProcessGroup | None  # ranks with this seat in all replicas; None: each replica encodes its own tiles
    tensor: int  # tensor-parallel ranks, which are neighbours

    @property
    def seat(self) -> int:
        """This rank's place in its replica."""
        return self.replica.rank()


def build_team(use: TileUse, balance: str) -> Team:
    """The team of this process, which needs tiles for `use`. A collective call."""
    own: list = [None] * dist.get_world_size()
    here = parallel_state.get_data_parallel_rank()
    dist.all_gather_object(own, (here, use))
    ranks = [rank for rank, (replica, _) in enumerate(own) if replica == here]
    group = groups.subgroups(ranks)
    assert (group.rank(), group.size()) == groups.seat(), "loaders divide images by another order of the ranks"
    across = parallel_state.get_data_parallel_group()
    everywhere = balance == "global" and across.size() > 1
    uses, tensor = tuple(own[rank][1] for rank in ranks), parallel_state.get_tensor_model_parallel_world_size()
    return Team(group, uses, across if everywhere else None, tensor)


@dataclass(frozen=True, slots=True)
class Forth:
    """A pre-pass of a learning encoder: the `way` of its tiles, and the features of each micro-batch, of `received`
    tokens in all."""

    way: Way
    leaves: tuple[Leaf, ...]
    received: int


@dataclass(frozen=True, slots=True)
class BalancedVision:
    """The vision path, with the work shared by a team."""

    path: VisionPath
    team: Team

    def within_replica(self) -> BalancedVision:
        """The same, without exchange between replicas."""
        return replace(self, team=replace(self.team, across=None))

    @torch.no_grad()
    def encode(self, batches: Sequence[Batch]) -> list[Batch]:
        """`batches` with the features that this process uses. A collective call of the team."""
        return self._encoded(batches)[0]

    @torch.no_grad()
    def forth(self, batches: Sequence[Batch]) -> tuple[list[Batch], Forth]:
        """As `encode`, with features that get gradients, and what `back` needs."""
        encoded, way = self._encoded(batches)
        pairs = [with_leaf(batch) for batch in encoded]
        return [batch for batch, _ in pairs], Forth(way, tuple(leaf for _, leaf in pairs), len(encoded[0].features))

    def back(self, forth: Forth) -> None:
        """Add the gradients of the encoder's weights, given those of the features. A collective call of the team."""
        with torch.no_grad():
            gradients_nC = forth.way.back(gradients(forth.leaves, forth.received))
        self.path.backward(forth.way.pixels, gradients_nC, forth.way.trip.come)

    def _encoded(self, batches: Sequence[Batch]) -> tuple[list[Batch], Way]:
        team, pixels_t3 = self.team, torch.cat([batch.pixels for batch in batches])
        tokens_T = torch.cat([batch.tile_tokens for batch in batches])
        holder_T = torch.cat([batch.holder for batch in batches])
        everyone, here = _counts_of_replicas(len(tokens_T), team, pixels_t3.device)
        room = [seat_counts(everyone, team.replica.size(), seat)[here] for seat in range(team.replica.size())]
        seat_T = torch.tensor(encoding_seats(holder_T.tolist(), room), dtype=torch.long, device="cpu")
        seats, own_T3 = _share_pixels(pixels_t3, holder_T, seat_T, team)
        trip = self._trip(tokens_T[seats[team.seat]], everyone, own_T3.device)
        wanted = _wanted(batches, team.uses)
        way = Way(team.replica, team.tensor, tokens_T, seats, wanted, trip, trip.tiles(own_T3))
        features_nC = trip.home(self.path.features(way.pixels, trip.come))
        received = _deal(features_nC, way)
        rows_N = torch.full((int(tokens_T.sum()),), PAD, device="cpu")
        rows_N[token_rows(way.arriving, tokens_T)] = torch.arange(len(received), device="cpu")
        parts = rows_N.split([int(batch.tile_tokens.sum()) for batch in batches])
        return [batch.with_some_features(received, rows) for batch, rows in zip(batches, parts, strict=True)], way

    def _trip(self, tokens_T: Tensor, everyone: Sequence[int], place: torch.device) -> Trip:
        """Where the tiles assigned to this seat are encoded."""
        group = self.team.across
        if group is None:
            return Trip.none(tokens_T)
        sent = spread(seat_counts(everyone, self.team.replica.size(), self.team.seat))
        return Trip.of(tokens_T, sent[group.rank()], [row[group.rank()] for row in sent], group, place)


def _share_pixels(pixels_t3: Tensor, holder_T: Tensor, seat_T: Tensor, team: Team) -> tuple[list[Tensor], Tensor]:
    """Send pixels from where they are to the seats `seat_T`. Returns the tiles of each seat, in the order in which it
    receives them, and the pixels of this seat's tiles."""
    here_T = (holder_T == EVERYWHERE) | (holder_T == team.seat)
    assert int(here_T.sum()) == len(pixels_t3), "the pixels are not those of the tiles that this rank should have"
    from_T = torch.where(holder_T == EVERYWHERE, seat_T, holder_T)  # what is everywhere need not move
    size = team.replica.size()
    way_T = seat_T * size + from_T
    order = way_T.argsort(stable=True)
    counts = way_T.bincount(minlength=size * size).view(size, size)  # tiles by (to, from)
    seats = list(order.split(counts.sum(1).tolist()))
    moved = not torch.equal(from_T, seat_T)
    sent = order[from_T[order] == team.seat] if moved else seats[team.seat]
    rows = (here_T.cumsum(0) - 1)[sent]
    own_T3 = pixels_t3[to_device(rows, pixels_t3.device)]
    if moved:
        own_T3 = exchange(own_T3, counts[:, team.seat].tolist(), counts[team.seat].tolist(), team.replica)
    return seats, own_T3


def _counts_of_replicas(count: int, team: Team, device: torch.device) -> tuple[list[int], int]:
    if team.across is None:
        return [count], 0
    counts = torch.zeros(team.across.size(), dtype=torch.long, device=device)
    counts[team.across.rank()] = count
    dist.all_reduce(counts, group=team.across)
    return counts.tolist(), team.across.rank()


def _wanted(batches: Sequence[Batch], uses: Sequence[TileUse]) -> list[Tensor]:
    """For each of `uses`, which tiles [T] of all `batches` it needs."""

    def used(rows_of: Callable[[Batch], Tensor]) -> Tensor:
        parts = []
        for batch in batches:
            found_T = torch.zeros(len(batch.tile_tokens), dtype=torch.bool, device="cpu")
            found_T[batch.tiles_of(rows_of(batch))] = True
            parts.append(found_T)
        return torch.cat(parts)

    stream_T, keys_T = used(lambda batch: batch.stream_rows), used(lambda batch: batch.cross_rows)
    return [stream_T & use.stream | keys_T & use.keys for use in uses]


def _deal(features_nC: Tensor, way: Way) -> Tensor:
    """Send features of each seat's tiles to the seats that need them; returns those of `way.arriving`."""
    mine, tokens_T = way.seats[way.replica.rank()], way.tokens
    picked = [wanted_T[mine].nonzero()[:, 0] for wanted_T in way.wanted]
    rows_n = token_rows(torch.cat(picked), tokens_T[mine])
    send = features_nC.index_select(0, to_device(rows_n, features_nC.device))
    out = [int(tokens_T[mine[places]].sum()) for places in picked]
    wanted_T = way.wanted[way.replica.rank()]
    return exchange(send, out, [int(tokens_T[tiles[wanted_T[tiles]]].sum()) for tiles in way.seats], way.replica)
