"""The vision pre-pass: before the pipeline runs, all ranks encode an even share of a step's tiles.

The encoder is frozen, so it need not live in the first pipeline stage: there it would hold up all others. Tiles of a
step's micro-batches are dealt to the ranks of the replica (with vision.balance=global to those of all replicas), and
each rank then receives the features of the tiles that its stage uses.

Ranks are named by their replica and their seat in it. Tile i of all replicas' tiles, one behind the other, goes to
seat i mod (ranks of a replica); among the ranks of that seat, one in each replica, tiles stay at home as far as an
even share allows. So pixels move between replicas only where they must, and no rank has more than one tile more than
another.

Shapes: T tiles, K tokens per tile, C feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nvlm.data.batch import PAD, Batch
from nvlm.processes import groups
from nvlm.tiling.placement import TileUse
from nvlm.vision.path import VisionPath


def seat_tiles(counts: Sequence[int], seats: int, seat: int) -> list[list[int]]:
    """Tiles of each replica that fall to `seat`, numbered within the replica; `counts` are tiles by replica."""
    starts = [sum(counts[:r]) for r in range(len(counts))]
    return [list(range((seat - start) % seats, count, seats)) for start, count in zip(starts, counts)]


def spread(own: Sequence[int]) -> list[list[int]]:
    """How many tiles each replica sends to each, [from][to], so that none has more than one more than another.

    `own`: tiles by replica before. Tiles that need not move stay.
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
    """Tiles that each rank encodes, all ranks of all replicas; `counts` are tiles by replica, before."""
    if balance != "global":
        return [len(tiles) for count in counts for s in range(seats) for tiles in seat_tiles([count], seats, s)]
    columns = (spread([len(tiles) for tiles in seat_tiles(counts, seats, seat)]) for seat in range(seats))
    return [sum(received) for sent in columns for received in zip(*sent)]


@dataclass(frozen=True, slots=True)
class Team:
    """Who encodes with whom, seen from one rank."""

    replica: dist.ProcessGroup
    uses: tuple[TileUse, ...]  # by seat
    across: dist.ProcessGroup | None  # the same seat in all replicas; None: each replica encodes its own tiles

    @property
    def seat(self) -> int:
        """This rank's place in its replica."""
        return self.replica.rank()


def build_team(use: TileUse, balance: str) -> Team:
    """The team of this process, which puts tiles to `use`. All processes call it together."""
    own: list = [None] * dist.get_world_size()
    here = parallel_state.get_data_parallel_rank()
    dist.all_gather_object(own, (here, use))
    ranks = [rank for rank, (replica, _) in enumerate(own) if replica == here]
    group = groups.subgroups(ranks)
    across = parallel_state.get_data_parallel_group()
    everywhere = balance == "global" and across.size() > 1
    return Team(group, tuple(own[rank][1] for rank in ranks), across if everywhere else None)


@dataclass(frozen=True, slots=True)
class BalancedVision:
    """The frozen path, shared by a team."""

    path: VisionPath
    team: Team

    def within_replica(self) -> BalancedVision:
        """The same without other replicas."""
        return replace(self, team=replace(self.team, across=None))

    @torch.no_grad()
    def encode(self, batches: Sequence[Batch]) -> list[Batch]:
        """`batches` with the features that this process uses. All processes of the team call it together."""
        team, counts = self.team, [len(batch.pixels) for batch in batches]
        pixels_T3 = torch.cat([batch.pixels for batch in batches])
        everyone, here = _counts_of_replicas(len(pixels_T3), team, pixels_T3.device)
        seats = [seat_tiles(everyone, team.replica.size(), seat)[here] for seat in range(team.replica.size())]
        features = self._encode_share(pixels_T3[seats[team.seat]], everyone)
        wanted = [_used(batches, counts, use) for use in team.uses]
        received, rows = _deal(features, seats, wanted, team)
        row_of_T = torch.full((len(pixels_T3),), PAD, device="cpu")
        row_of_T[rows] = torch.arange(len(rows), device="cpu")
        return [
            batch.with_some_features(received, row_of)
            for batch, row_of in zip(batches, row_of_T.split(counts), strict=True)
        ]

    def _encode_share(self, own_T3: Tensor, everyone: Sequence[int]) -> Tensor:
        """Features of the tiles that fell to this seat, whoever encodes them."""
        group = self.team.across
        if group is None:
            return self.path.features(own_T3)
        by_replica = [len(tiles) for tiles in seat_tiles(everyone, self.team.replica.size(), self.team.seat)]
        sent = spread(by_replica)
        out, back = sent[group.rank()], [row[group.rank()] for row in sent]
        return exchange(self.path.features(exchange(own_T3, out, back, group)), back, out, group)


def _counts_of_replicas(count: int, team: Team, device: torch.device) -> tuple[list[int], int]:
    if team.across is None:
        return [count], 0
    counts = torch.zeros(team.across.size(), dtype=torch.long, device=device)
    counts[team.across.rank()] = count
    dist.all_reduce(counts, group=team.across)
    return counts.tolist(), team.across.rank()


def _used(batches: Sequence[Batch], counts: Sequence[int], use: TileUse) -> set[int]:
    """Numbers, over all `batches`, of the tiles that a stage with `use` needs."""
    found, start = set(), 0
    for batch, count in zip(batches, counts):
        found |= {start + t for t in batch.on_host.stream_tiles.tolist()} if use.stream else set()
        found |= {start + t for t in batch.on_host.cross_tiles.tolist()} if use.keys else set()
        start += count
    return found


def _deal(features: Tensor, seats: list[list[int]], wanted: list[set[int]], team: Team) -> tuple[Tensor, list[int]]:
    """Each seat's tiles to the seats that want them; returns features and the numbers of their tiles."""
    mine = seats[team.seat]
    picked = [[place for place, tile in enumerate(mine) if tile in tiles] for tiles in wanted]
    arriving = [[tile for tile in tiles if tile in wanted[team.seat]] for tiles in seats]
    send = features[[place for places in picked for place in places]]
    received = exchange(send, [len(p) for p in picked], [len(a) for a in arriving], team.replica)
    return received, [tile for tiles in arriving for tile in tiles]


def exchange(x: Tensor, out: Sequence[int], back: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of `x`, `out[r]` of them to rank r, one run behind the other; `back[r]` rows come from rank r."""
    received = x.new_empty(sum(back), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), list(back), list(out), group=group)
    return received
