"""How a machine's cores and GPUs are divided among runs side by side. Pure functions. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvlm.config.values import problem

MEMORY = 1.5 * 2**30
"""Bytes of host memory that one process of a small run needs: mostly torch and Megatron themselves (measured: 1.3)."""


@dataclass(frozen=True, slots=True)
class Share:
    """The cores and the GPUs, by their names in CUDA_VISIBLE_DEVICES, of one run at a time."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()

    def environment(self, processes: int) -> dict[str, str]:
        """Environment variables of a run of `processes` processes in this share."""
        threads = {"OMP_NUM_THREADS": str(max(1, len(self.cores) // processes))}
        return threads | ({"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {})


@dataclass(frozen=True, slots=True)
class Wish:
    """What a run asks for: its processes, and the CPU threads of each (None: it takes what it gets)."""

    processes: int
    threads: int | None


def divide(
    cores: Sequence[int], gpus: Sequence[str], memory: float, wishes: Sequence[Wish], jobs: int | None
) -> list[Share]:
    """One share for each of the runs side by side: `jobs`, or as many as the largest of the `wishes` allows.

    With GPUs, a run gets one per process, and runs share the cores evenly. Without, a run wants a core per thread.
    `memory`: bytes that are available; it limits the default, not `jobs`. Raises ConfigError if `jobs` is too many.
    """
    processes = max(wish.processes for wish in wishes)
    if gpus:
        most, what = len(gpus) // processes, f"the {len(gpus)} GPUs"
    else:
        most, what = len(cores), f"the {len(cores)} cores"
    if jobs is not None and not 1 <= jobs <= max(1, most):
        raise problem("jobs", jobs, f"1 to {max(1, most)}, for {what} here", f"jobs={max(1, most)}, or leave it out")
    if not gpus and jobs is None:
        wanted = max(wish.processes * (wish.threads or 1) for wish in wishes)
        most = min(len(cores) // wanted, int(memory / (MEMORY * processes)))
    count = max(1, min(jobs or most, len(wishes)))
    each = processes if gpus else 0
    return [
        Share(_part(cores, number, count), tuple(gpus[number * each : (number + 1) * each])) for number in range(count)
    ]


def _part(cores: Sequence[int], number: int, count: int) -> tuple[int, ...]:
    """Part `number` of `count` equal parts of neighbouring cores; what does not divide evenly goes to the last."""
    size = len(cores) // count
    if not size:
        return (cores[number % len(cores)],)
    return tuple(cores[number * size : (number + 1) * size if number + 1 < count else len(cores)])
