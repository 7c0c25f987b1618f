"""Which rows and columns of a published tensor are which of ours, for any tensor-parallel rank. Imports no torch.

Megatron joins what is published apart (queries, keys and values; gate and up), splits rows or columns over the
tensor-parallel ranks, and pads the vocabulary. One `Part` says all of it, and serves three ways: reading a rank's
slices, writing whole tensors, and checking names and shapes without any data.
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

    The rows of `ours` lie in `groups` equal groups, in each of which this part's begin at `offset`. Tensor-parallel
    ranks share whole groups where there are several, else each rank's rows are such a group, smaller.
    """

    name: str
    shape: tuple[int, ...]  # of the whole published tensor
    ours: str
    split: int | None = None  # the dimension that tensor-parallel ranks share out; None: whole on each
    groups: int = 1
    offset: int = 0
    region: Region = ()  # of the published tensor; (): all of it
    padded: int = 0  # rows of ours where that is more than the published tensor has

    @property
    def extent(self) -> Region:
        """The region, dimension by dimension."""
        return self.region + tuple(slice(0, size) for size in self.shape[len(self.region) :])

    def source(self, rank: int, size: int) -> Region:
        """What tensor-parallel rank `rank` of `size` needs of the published tensor."""
        if self.split is None or size == 1:
            return self.extent
        whole = self.extent[self.split]
        each = (self.padded or whole.stop - whole.start) // size
        start = min(whole.start + rank * each, whole.stop)
        own = slice(start, min(start + each, whole.stop))
        return (*self.extent[: self.split], own, *self.extent[self.split + 1 :])

    def target(self, local: Tensor, rank: int = 0, size: int = 1) -> Tensor:
        """A view of `local`, the rank's share of our tensor, of just the rows that `source` fills, group by group."""
        rows = self.source(rank, size)[0]
        count = rows.stop - rows.start
        if self.padded:
            return local[:count]
        splits = self.split == 0
        groups = self.groups // size if splits and self.groups > 1 else self.groups
        offset = self.offset // size if splits and self.groups == 1 else self.offset
        return local.unflatten(0, (groups, -1))[:, offset : offset + count // groups]

    def padding(self, local: Tensor, rank: int = 0, size: int = 1) -> Tensor:
        """The rows of `local` behind those that `source` fills: empty but for a padded vocabulary's last ranks."""
        rows = self.source(rank, size)[0]
        return local[rows.stop - rows.start :] if self.padded else local[:0]


def below(prefix: str, parts: Iterable[Part]) -> list[Part]:
    """The same parts of tensors published under `prefix`."""
    return [replace(part, name=prefix + part.name) for part in parts]


def shapes(parts: Iterable[Part]) -> dict[str, tuple[int, ...]]:
    """Published tensors, each once, in the order of `parts`."""
    return {part.name: part.shape for part in parts}


def published(parts: Iterable[Part], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole published tensors from whole ones of ours; what no part covers is zero. It maps gradients as well."""
    out: dict[str, Tensor] = {}
    for part in parts:
        view = part.target(ours[part.ours].detach())
        if part.name not in out:
            out[part.name] = view.new_zeros(part.shape)
        region = out[part.name][part.extent]
        region.copy_(view.reshape(region.shape))
    return out


def joined(parts: Iterable[Part], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `published`: whole tensors of ours. Missing or surplus names raise ValueError."""
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
