"""Which steps must not update the weights: those with a non-finite loss or gradient norm, or with a loss spike.

The state is a few plain numbers, which go into checkpoints. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

_HISTORY = 50  # good steps in the running mean
_LEAST = 10  # good steps before a loss can count as a spike


class BrokenRun(RuntimeError):
    """Too many bad steps in a row; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Guard:
    """Running statistics of a run's losses. `spike_factor`: 0 accepts any finite loss."""

    spike_factor: float = 0.0
    mean: float = 0.0  # of the losses of good steps
    good: int = 0
    bad_in_row: int = 0
    skipped: int = 0  # in the whole run

    def numbers(self) -> dict[str, float]:
        """The state for a checkpoint; `Guard(spike_factor, **numbers)` restores it."""
        return {name: number for name, number in asdict(self).items() if name != "spike_factor"}


NAN_ONLY = Guard()


def is_bad(guard: Guard, loss: float, finite: bool) -> bool:
    """True if a step must not change the weights. `finite`: loss and gradient norm are finite on all ranks."""
    if not (finite and math.isfinite(loss)):
        return True
    return guard.spike_factor > 0 and guard.good >= _LEAST and loss > guard.spike_factor * guard.mean


def after(guard: Guard, loss: float, bad: bool) -> Guard:
    """The guard after one more step."""
    if bad:
        return replace(guard, bad_in_row=guard.bad_in_row + 1, skipped=guard.skipped + 1)
    good = guard.good + 1
    mean = guard.mean + (loss - guard.mean) / min(good, _HISTORY)
    return replace(guard, mean=mean, good=good, bad_in_row=0)


def broken(guard: Guard, step: int, loss: float, grad_norm: float, samples: Sequence[str]) -> BrokenRun:
    """The error that ends the run at `step`. `samples`: the ids of this step's samples."""
    return BrokenRun(
        f"step {step}: loss {loss:g}, gradient norm {grad_norm:g} (mean loss of good steps: {guard.mean:.3f}); "
        f"{guard.bad_in_row} bad steps in a row, so the run stops. Samples of this step: {', '.join(samples)}. "
        f"Fix: look at them, or lower optim.lr; train.max_bad_steps and train.spike_factor set the limits"
    )
