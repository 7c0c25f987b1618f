"""Dropout that is the same in every layout: a hash of (seed, linear, place, feature) instead of a random generator.

A token's place (`Batch.place`) encodes its step, its row among all replicas' rows, and its column. So the mask depends
neither on the distribution of rows over replicas and micro-batches nor on the split of columns and features over ranks.

Shapes: S columns, B rows, X keys, F features of a linear's input (on this rank).
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

COLUMNS, KEYS = "columns", "keys"
"""What a linear's input holds: tokens of the text stream, or cross-attended keys."""

_NAMES = {COLUMNS: "dropout columns", KEYS: "dropout keys"}


def remember_places(place_BS: Tensor, place_BX: Tensor) -> None:
    """Set the places of the columns and keys for the forward pass that follows.

    They are kept among Megatron's random states, which recomputation restores: in a pipeline, a micro-batch is
    recomputed after the forward passes of later ones.
    """
    tracker = get_cuda_rng_tracker()
    # Contiguous, so that masks and gradients are: Transformer Engine takes no other gradient of a norm's output.
    places = {_NAMES[COLUMNS]: place_BS.t().contiguous(), _NAMES[KEYS]: place_BX.t().contiguous()}
    tracker.set_states(tracker.get_states() | places)


def places(kind: str) -> Tensor:
    """The current places [S, B] of `kind`."""
    return get_cuda_rng_tracker().get_states()[_NAMES[kind]]


def dropped(x_SBF: Tensor, rate: float, linear: int, place_SB: Tensor, first: int) -> Tensor:
    """`x_SBF` with a share `rate` of its elements zeroed and the others scaled by 1 / (1 - rate).

    `linear` identifies the linear and the seed; `first` is the index of this rank's first feature.
    """
    assert place_SB.shape == x_SBF.shape[:2], (place_SB.shape, x_SBF.shape)
    features_F = torch.arange(first, first + x_SBF.shape[-1], dtype=torch.int32, device=x_SBF.device)
    bits_SBF = _mixed(_folded(place_SB, linear)[..., None] ^ _mixed(features_F))
    kept_SBF = (bits_SBF & 0x7FFFFFFF) >= int(rate * 2**31)
    return torch.where(kept_SBF, x_SBF / (1 - rate), 0.0)


def _folded(place_SB: Tensor, linear: int) -> Tensor:
    """32 bits of each 64-bit place, mixed with `linear`."""
    low, high = place_SB.int(), (place_SB >> 32).int()
    key = linear - 2**32 if linear >= 2**31 else linear
    return _mixed(_mixed(low ^ key) ^ high)


def _mixed(x: Tensor) -> Tensor:
    """An int32 hash (Wellons' "lowbias32"): every output bit depends on every input bit. Products wrap around."""
    x = x ^ _shifted(x, 16)
    x = x * 0x7FEB352D
    x = x ^ _shifted(x, 15)
    x = x * (0x846CA68B - 2**32)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of `x`."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
