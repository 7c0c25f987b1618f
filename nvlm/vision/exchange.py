"""Moves tiles and their features between ranks: all-to-alls of rows, and which rows are a tile's.

Shapes: T tiles, N tokens of all T tiles, n of some, C feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm.processes.device import to_device


def exchange(x: Tensor, out: Sequence[int], back: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all of the rows of `x`: consecutive runs of `out[r]` rows go to rank r, `back[r]` rows come from it."""
    received = x.new_empty(sum(back), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), list(back), list(out), group=group)
    return received


def token_rows(tiles: Tensor, tokens_T: Tensor) -> Tensor:
    """The rows of the tokens of `tiles`, tile by tile, in a tensor that holds the tokens of all T tiles in order."""
    first_T, counts = tokens_T.cumsum(0) - tokens_T, tokens_T[tiles]
    shifts = first_T[tiles] - (counts.cumsum(0) - counts)
    return torch.repeat_interleave(shifts, counts) + torch.arange(int(counts.sum()), device="cpu")


@dataclass(frozen=True, slots=True)
class Trip:
    """The way of this seat's tiles to the replicas that encode them: `out[r]` go to replica r, `back[r]` come from it.

    `left`, `come`: the tokens of each tile that leaves, and of each that comes. Without a `group`, tiles stay.
    """

    group: dist.ProcessGroup | None
    out: Sequence[int]
    back: Sequence[int]
    left: Tensor
    come: Tensor

    @classmethod
    def of(
        cls, tokens: Tensor, out: Sequence[int], back: Sequence[int], group: dist.ProcessGroup, place: torch.device
    ) -> Trip:
        """The trip of tiles with so many `tokens`. A collective call of `group`."""
        return cls(group, out, back, tokens, exchange(to_device(tokens, place), out, back, group).cpu())

    @classmethod
    def none(cls, tokens: Tensor) -> Trip:
        """No trip: each replica encodes its own tiles, which have so many `tokens`."""
        return cls(None, (), (), tokens, tokens)

    def tiles(self, pixels_T3: Tensor) -> Tensor:
        """The pixels of the tiles that come, for those that leave."""
        return pixels_T3 if self.group is None else exchange(pixels_T3, self.out, self.back, self.group)

    def away(self, x_nC: Tensor) -> Tensor:
        """Rows by token, from where the tiles left to where they are encoded."""
        if self.group is None:
            return x_nC
        return exchange(x_nC, _sums(self.left, self.out), _sums(self.come, self.back), self.group)

    def home(self, x_nC: Tensor) -> Tensor:
        """Rows by token, from where the tiles were encoded to where they came from."""
        if self.group is None:
            return x_nC
        return exchange(x_nC, _sums(self.come, self.back), _sums(self.left, self.out), self.group)


def _sums(tokens_T: Tensor, counts: Sequence[int]) -> list[int]:
    return [int(part.sum()) for part in tokens_T.split(list(counts))]
