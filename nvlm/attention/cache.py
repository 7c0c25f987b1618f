"""The key-value cache of attention, for generating text.

Shapes: S new columns, X cached columns, B rows, G key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvlm.attention.precision import for_kernel


class KeyValues:
    """The keys and values [X, B, G, D] of one attention module, in the precision of the kernels.

    They lie in memory as [B, G, X, D], so that a kernel reads those of one head of one row in one piece.
    """

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, Tensor] | None = None  # [B, G, X or more, D]
        self.length = 0

    def __bool__(self) -> bool:
        return self.buffers is not None

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """All keys and all values so far, as views."""
        assert self.buffers is not None, "the cache is empty"
        keys, values = (buffer.narrow(2, 0, self.length).permute(2, 0, 1, 3) for buffer in self.buffers)
        return keys, values

    def keep(self, key_XBGD: Tensor, value_XBGD: Tensor) -> tuple[Tensor, Tensor]:
        """Replace what is cached: for keys that never grow."""
        self.buffers, self.length = (_by_head(key_XBGD).contiguous(), _by_head(value_XBGD).contiguous()), len(key_XBGD)
        return self.pair

    def append(self, key_SBGD: Tensor, value_SBGD: Tensor) -> tuple[Tensor, Tensor]:
        """Append to what is cached; returns all of it."""
        new, columns, before = (_by_head(key_SBGD), _by_head(value_SBGD)), len(key_SBGD), self.length
        self.length += columns
        if self.buffers is None or self.buffers[0].shape[2] < self.length:
            self.buffers = tuple(self._larger(number, x) for number, x in enumerate(new))
        for buffer, x in zip(self.buffers, new):
            buffer.narrow(2, before, columns).copy_(x)
        return self.pair

    def _larger(self, number: int, like_BGSD: Tensor) -> Tensor:
        """A buffer with 50% spare room, so that appending is cheap on average."""
        rows, groups, _, width = like_BGSD.shape
        buffer = like_BGSD.new_empty(rows, groups, self.length + self.length // 2 + 64, width)
        if self.buffers is not None:
            old = self.buffers[number]
            buffer[:, :, : old.shape[2]] = old
        return buffer

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        if self.buffers is not None:
            self.buffers = tuple(buffer.index_select(0, rows) for buffer in self.buffers)


def _by_head(x_XBGD: Tensor) -> Tensor:
    return for_kernel(x_XBGD).permute(1, 2, 0, 3)


@dataclass(frozen=True, slots=True)
class Past:
    """The masks of the newest column over the caches, in the form of `Dense`; None if nothing is hidden."""

    columns: Tensor | None  # [B, 1, 1, X], including the newest
    keys: Tensor | None  # [B, 1, 1, X]

    def grown(self) -> Past:
        """With one more column, which is visible."""
        return self if self.columns is None else Past(nn.functional.pad(self.columns, (0, 1)), self.keys)

    def selected(self, rows: Tensor) -> Past:
        """Only these rows."""
        return Past(*(None if mask is None else mask[rows] for mask in (self.columns, self.keys)))

    def shortened(self) -> Past:
        """Without masks that hide nothing: kernels are faster without a mask."""
        return Past(*(mask if mask is not None and mask.any() else None for mask in (self.columns, self.keys)))


class KeepsKeys:
    """An attention module that uses `cache` if one is attached."""

    cache: KeyValues | None = None


@contextmanager
def cached(parts: Sequence[nn.Module]) -> Iterator[list[KeyValues]]:
    """Attach an empty cache to every module of `parts` that keeps keys; yields the caches."""
    modules = [m for part in parts for m in part.modules() if isinstance(m, KeepsKeys)]
    for module in modules:
        module.cache = KeyValues()
    try:
        yield [module.cache for module in modules]
    finally:
        for module in modules:
            module.cache = None


@contextmanager
def generating(parts: Sequence[nn.Module]) -> Iterator[None]:
    """`parts` in evaluation mode, without gradients, and able to process one column of any number of rows."""
    modules = [m for part in parts for m in part.modules()]
    holders = {id(x): x for m in modules for x in (m, getattr(m, "config", None)) if x is not None}.values()
    changed = [(x, name, getattr(x, name)) for x in holders for name in _ONE_COLUMN if getattr(x, name, None)]
    training = [part.training for part in parts]
    for part in parts:
        part.eval()
    for holder, name, _ in changed:
        setattr(holder, name, _ONE_COLUMN[name])
    try:
        with torch.inference_mode():
            yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)
        for part, mode in zip(parts, training):
            part.train(mode)


# Settings that do not work with one column: it cannot be split, FP8 products need the number of tokens to be a multiple
# of at least 8, and the fused rotary embeddings give all rows the same position.
_ONE_COLUMN = {"sequence_parallel": False, "fp8": None, "apply_rope_fusion": False, "fused_single_qkv_rope": False}
