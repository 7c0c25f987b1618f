"""A step on its way from a loader worker to the process that trains.

Torch sends a tensor to another process through shared memory, which takes a connection for each tensor: 0.2 ms, and a
step has dozens. Only pixels are worth that; all other tensors travel as arrays, by value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nvlm.data.batch import Batch

if TYPE_CHECKING:
    from nvlm.data.loader import StepData


@dataclass(frozen=True, slots=True)
class Parcel:
    """A step whose batches have arrays in place of all tensors but pixels."""

    closed: StepData

    def pin_memory(self) -> Parcel:
        """The same in page-locked memory. Called by torch's DataLoader, in a thread of the process that trains."""
        return Parcel(_each_batch(self.opened(), Batch.pin_memory))

    def opened(self) -> StepData:
        """The step, with tensors."""
        return _each_batch(self.closed, open_batch)


def close(step: StepData) -> Parcel:
    """`step` as a parcel."""
    return Parcel(_each_batch(step, close_batch))


def close_batch(batch: Batch) -> Batch:
    """`batch` with arrays in place of all tensors but pixels."""
    return _converted(batch, torch.Tensor, torch.Tensor.numpy)


def open_batch(batch: Batch) -> Batch:
    """`batch` with tensors again."""
    return _converted(batch, np.ndarray, torch.from_numpy)


def _each_batch(step: StepData, change: Callable[[Batch], Batch]) -> StepData:
    return replace(step, micro_batches=tuple(map(change, step.micro_batches)))


def _converted(batch: Batch, kind: type, convert: Callable[[Any], Any]) -> Batch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "pixels"}
    return replace(batch, **{name: convert(x) for name, x in values.items() if isinstance(x, kind)})
