"""Python's garbage collection during training: at the same steps on all ranks.

A collection walks through all objects that can be part of a cycle: more than half a million, most of them from the
imports of torch and Megatron. Each rank would start it in a step of its own, in which all others would wait.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_EVERY = 20  # steps; a step leaves a few cycles behind, and none of them holds a tensor


class Collector:
    """Context manager around a training loop. Called after each step, it collects every `_EVERY` steps; after the first
    call there are no automatic collections, and later ones omit the objects that exist by then."""

    def __init__(self) -> None:
        self.frozen = False

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *error) -> None:
        gc.unfreeze()
        gc.enable()

    def __call__(self, step: int) -> None:
        if not self.frozen:  # not earlier: the loader's workers, forked before the first step, collect automatically
            gc.collect()
            gc.freeze()
            gc.disable()
            self.frozen = True
        elif step % _EVERY == 0:
            gc.collect()


@contextlib.contextmanager
def automatic() -> Iterator[None]:
    """A block with automatic collections, for work whose ranks do not wait for one another after each step."""
    by_hand = not gc.isenabled()
    gc.enable()
    try:
        yield
    finally:
        if by_hand:
            gc.disable()
