"""Maps rows and columns of published tensors to ours, for any tensor-parallel rank. Imports no torch.

Megatron fuses tensors that are published separately (queries, keys and values; gate and up), splits rows or columns
over tensor-parallel ranks, and pads the vocabulary. A `Part` describes all of this, and serves to read a rank's slices,
to write whole tensors, and to check names and shapes without any data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Region = tuple[slice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A region of the published tensor `name`, and the rows of our tensor `ours` that hold it.

    The rows of `ours` form `groups` equal groups; in each, this part's rows start at `offset`. Tensor-parallel ranks
    get whole groups if there are several; otherwise each rank's rows are one group of the same structure, but smaller.
    """

    name: str
    shape: tuple[int, ...]  # of the whole published tensor
    ours: str
    split: int | None = None  # the dimension split over tensor-parallel ranks; None: replicated
    groups: int = 1
    offset: int = 0
    region: Region = ()  # of the published tensor; (): all of it
    padded: int = 0  # rows of `ours` if it is padded to more than the published tensor has

    @property
    def extent(self) -> Region:
        """The region with a slice for every dimension."""
        return self.region + tuple(slice(0, size) for size in self.shape[len(self.region) :])

    def source(self, rank: int, size: int) -> Region:
        """The region of the published tensor that tensor-parallel rank `rank` of `size` needs."""
        if self.split is None or size == 1:
            return self.extent
        whole = self.extent[self.split]
        each = (self.padded or whole.stop - whole.start) // size
        start = min(whole.start + rank * each, whole.stop)
        own = slice(start, min(start + each, whole.stop))
        return (*self.extent[: self.split], own, *self.extent[self.split + 1 :])

    def target(self, local: Tensor, rank: int = 0, size: int = 1) -> Tensor:
        """A view of the rows of `local`, the rank's share of our tensor, that `source` fills, group by group."""
        rows = self.source(rank, size)[0]
        count = rows.stop - rows.start
        if self.padded:
            return local[:count]
        splits = self.split == 0
        groups = self.groups // size if splits and self.groups > 1 else self.groups
        offset = self.offset // size if splits and self.groups == 1 else self.offset
        return local.unflatten(0, (groups, -1))[:, offset : offset + count // groups]

    def padding(self, local: Tensor, rank: int = 0, size: int = 1) -> Tensor:
        """The rows of `local` after those that `source` fills; empty except on a padded vocabulary's last ranks."""
        rows = self.source(rank, size)[0]
        return local[rows.stop - rows.start :] if self.padded else local[:0]


def below(prefix: str, parts: Iterable[Part]) -> list[Part]:
    """`parts` with `prefix` before their published names."""
    return [replace(part, name=prefix + part.name) for part in parts]


def shapes(parts: Iterable[Part]) -> dict[str, tuple[int, ...]]:
    """Shapes of the published tensors by name, in the order of `parts`."""
    return {part.name: part.shape for part in parts}


def published(parts: Iterable[Part], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole published tensors from our whole tensors, zero where no part covers them. Works for gradients too."""
    out: dict[str, Tensor] = {}
    for part in parts:
        view = part.target(ours[part.ours].detach())
        if part.name not in out:
            out[part.name] = view.new_zeros(part.shape)
        region = out[part.name][part.extent]
        region.copy_(view.reshape(region.shape))
    return out


def joined(parts: Iterable[Part], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `published`: our whole tensors. Missing or surplus names raise ValueError."""
    parts = list(parts)
    rows: dict[str, int] = {}
    for part in parts:
        own = part.padded or part.extent[0].stop - part.extent[0].start
        rows[part.ours] = rows.get(part.ours, 0) + own
    missing, surplus = sorted(shapes(parts).keys() - tensors.keys()), sorted(tensors.keys() - shapes(parts).keys())
    if missing or surplus:
        raise ValueError(f"weights: missing {missing[:3]} of {len(missing)}, surplus {surplus[:3]} of {len(surplus)}")
    out: dict[str, Tensor] = {}
    for part in parts:
        region = tensors[part.name][part.extent]
        if part.ours not in out:
            out[part.ours] = region.new_zeros(rows[part.ours], *region.shape[1:])
        view = part.target(out[part.ours])
        view.copy_(region.reshape(view.shape))
    return out
