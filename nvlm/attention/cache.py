"""Keys and values that attention keeps from one call to the next while text is generated.

Shapes: S new columns, X columns kept, B rows, G key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvlm.attention.precision import for_kernel


class KeyValues:
    """The keys and values [X, B, G, D] of one attention module, in the precision that kernels work in."""

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.length = 0

    def __bool__(self) -> bool:
        return self.buffers is not None

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """All keys and all values so far, as views."""
        assert self.buffers is not None, "nothing is kept yet"
        keys, values = self.buffers
        return keys.narrow(0, 0, self.length), values.narrow(0, 0, self.length)

    def keep(self, key_XBGD: Tensor, value_XBGD: Tensor) -> tuple[Tensor, Tensor]:
        """Keep these alone: keys that never grow."""
        self.buffers, self.length = (for_kernel(key_XBGD), for_kernel(value_XBGD)), len(key_XBGD)
        return self.buffers

    def append(self, key_SBGD: Tensor, value_SBGD: Tensor) -> tuple[Tensor, Tensor]:
        """Put these behind the others; returns all."""
        new, columns, before = (for_kernel(key_SBGD), for_kernel(value_SBGD)), key_SBGD.shape[0], self.length
        self.length += columns
        if self.buffers is None or self.buffers[0].shape[0] < self.length:
            self.buffers = tuple(self._larger(number, x) for number, x in enumerate(new))
        for buffer, x in zip(self.buffers, new):
            buffer.narrow(0, before, columns).copy_(x)
        return self.pair

    def _larger(self, number: int, like_SBGD: Tensor) -> Tensor:
        """A buffer for half as many columns again as are needed, so that growing costs little on average."""
        buffer = like_SBGD.new_empty(self.length + self.length // 2 + 64, *like_SBGD.shape[1:])
        if self.buffers is not None:
            old = self.buffers[number]
            buffer[: len(old)] = old
        return buffer

    def select(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        if self.buffers is not None:
            self.buffers = tuple(buffer.index_select(1, rows) for buffer in self.buffers)


@dataclass(frozen=True, slots=True)
class Past:
    """What the newest column of rows must not see of what caches keep: masks of `Dense`, None for nothing."""

    columns: Tensor | None  # [B, 1, 1, X], the newest counted
    keys: Tensor | None  # [B, 1, 1, X]

    def grown(self) -> Past:
        """With one more column, which is seen."""
        return self if self.columns is None else Past(nn.functional.pad(self.columns, (0, 1)), self.keys)

    def selected(self, rows: Tensor) -> Past:
        """Of these rows alone."""
        return Past(*(None if mask is None else mask[rows] for mask in (self.columns, self.keys)))

    def shortened(self) -> Past:
        """Without the masks that hide nothing: kernels are quicker without."""
        return Past(*(mask if mask is not None and mask.any() else None for mask in (self.columns, self.keys)))


class KeepsKeys:
    """An attention module that uses `cache` where one is attached."""

    cache: KeyValues | None = None


@contextmanager
def cached(parts: Sequence[nn.Module]) -> Iterator[list[KeyValues]]:
    """Attach an empty cache to every module of `parts` that keeps keys; yields them all."""
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
    """`parts` in evaluation mode, without gradients, and so that they take one column of any number of rows."""
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


# Settings of modules and their configurations that one column does not allow: it cannot be split, FP8 products take
# tokens by the dozen, and the fused rotary embedding gives all rows one position.
_ONE_COLUMN = {"sequence_parallel": False, "fp8": None, "apply_rope_fusion": False}
