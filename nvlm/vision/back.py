"""The way back of the vision pre-pass, if the encoder learns: gradients of features return to who encoded the tiles.

In the forward pass each rank gets the features of the tiles that it uses. Each micro-batch has its own copy, a leaf, so
that its backward pass adds up a gradient of that size alone. Which of these gradients are whole was measured: tensor
ranks all have the same, so one of them returns each tile's, in turn; context ranks and pipeline stages each have a
part, so the rank that encoded the tile sums theirs.

Shapes: T tiles of the replica's step, N tokens of all T tiles, n of some, C feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm.data.batch import PAD, Batch
from nvlm.processes.device import to_device
from nvlm.vision.exchange import Trip, exchange, token_rows


@dataclass(frozen=True, slots=True)
class Way:
    """What a rank of a replica knows of a pre-pass. Tiles are numbered over all micro-batches; tensors are on the CPU,
    except for pixels."""

    replica: dist.ProcessGroup
    tensor: int  # tensor-parallel ranks, neighbours in `replica`
    tokens: Tensor  # [T], of each tile
    seats: Sequence[Tensor]  # the tiles of each seat, in the order in which it has them
    wanted: Sequence[Tensor]  # [T] for each seat: the tiles whose features it uses
    trip: Trip  # of this seat's tiles to other replicas
    pixels: Tensor  # uint8 [t, 3, px, px], of the tiles that this rank encodes

    @property
    def arriving(self) -> Tensor:
        """The tiles whose features this rank uses, in the order in which it receives them."""
        return torch.cat([tiles[self.wanted[self.replica.rank()][tiles]] for tiles in self.seats])

    def returns(self, seat: int) -> Tensor:
        """[T]: the tiles whose gradients `seat` returns."""
        turn = torch.arange(len(self.tokens), device="cpu") % self.tensor == seat % self.tensor
        return self.wanted[seat] & turn

    def back(self, gradients_nC: Tensor) -> Tensor:
        """Gradients of the features that this rank encodes, in fp32, from those of the features it received. A
        collective call of all replicas that encode together."""
        return self.trip.away(self._summed(gradients_nC))

    def _summed(self, gradients_nC: Tensor) -> Tensor:
        """The sum over the replica's ranks, for this seat's tiles."""
        me, place = self.replica.rank(), gradients_nC.device
        mine, arriving, returned = self.seats[me], self.arriving, self.returns(me)
        kept = token_rows(returned[arriving].nonzero()[:, 0], self.tokens[arriving])
        out = [int(self.tokens[tiles[returned[tiles]]].sum()) for tiles in self.seats]
        picked = [self.returns(seat)[mine].nonzero()[:, 0] for seat in range(len(self.seats))]
        rows = [token_rows(places, self.tokens[mine]) for places in picked]
        sent = gradients_nC.index_select(0, to_device(kept, place))
        received = exchange(sent, out, [len(some) for some in rows], self.replica)
        total = gradients_nC.new_zeros(int(self.tokens[mine].sum()), gradients_nC.shape[1], dtype=torch.float32)
        for some, part in zip(rows, received.split([len(some) for some in rows])):  # in a fixed order
            total.index_add_(0, to_device(some, place), part.float())
        return total


@dataclass(frozen=True, slots=True)
class Leaf:
    """A micro-batch's copy of its features, and their rows among those that the rank received."""

    features: Tensor
    rows: Tensor


def with_leaf(batch: Batch) -> tuple[Batch, Leaf]:
    """`batch` with its own copy of its features, which gets a gradient."""
    assert batch.features is not None and batch.feature_rows is not None
    used = batch.feature_rows != PAD
    rows = batch.feature_rows[used]
    features = batch.features.index_select(0, to_device(rows, batch.features.device)).requires_grad_()
    own = torch.full_like(batch.feature_rows, PAD)
    own[used] = torch.arange(len(rows), device="cpu")
    return batch.with_some_features(features, own), Leaf(features, rows)


def gradients(leaves: Sequence[Leaf], count: int) -> Tensor:
    """[count, C]: the gradients of all received features, zero where nothing used them."""
    first = leaves[0].features
    found = first.new_zeros(count, first.shape[1], requires_grad=False)
    for leaf in leaves:
        if leaf.features.grad is not None:
            found[to_device(leaf.rows, found.device)] = leaf.features.grad
    return found
