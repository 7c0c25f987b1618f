"""A step's phases: their times, and their names in profiles.

Phases follow one another without gaps: data (waiting for the loader), vision, forward-backward, optimizer, log, save.
The optimizer's phase begins again with the update, before which the host has waited for the GPU: on a GPU a lap ends
there, and the update counts for the next step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from nvlm.config.learning_rules import PROFILED
from nvlm.processes import device
from nvlm.runs.sinks import spared

_WAIT, _WARM = 2, 1  # steps to warm up the caches, then the profiler


class Phases:
    """Context manager around a training loop; call it with step and phase at the start of each phase.

    `on_phase`: called with the same arguments. `profiler`: advanced with each step.
    """

    def __init__(self, on_phase: Callable[[int, str], None], profiler: torch.profiler.profile | None = None) -> None:
        self.on_phase, self.profiler = on_phase, profiler
        self.step: int | None = None
        self.begun: list[tuple[str, device.Moment]] = []
        self.range = contextlib.ExitStack()

    def __enter__(self) -> Phases:
        if self.profiler is not None:
            self.profiler.start()
        return self

    def __exit__(self, *error) -> None:
        self.range.close()
        if self.profiler is not None:
            self.profiler.stop()

    def __call__(self, step: int, phase: str) -> None:
        self.on_phase(step, phase)
        if not self.begun or (self.step, self.begun[-1][0]) != (step, phase):
            self._name(step, phase)
        self.begun.append((phase, device.Moment()))

    def _name(self, step: int, phase: str) -> None:
        """Give the work that follows its name in profiles."""
        self.range.close()
        if self.profiler is not None and self.step not in (None, step):
            self.profiler.step()
        self.step = step
        self.range.enter_context(device.named_range(phase))

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the end of the last lap; the current phase continues.

        Does not wait for the GPU, whose queue would run empty: the lap ends at the last phase that the GPU has begun,
        and what follows counts for the next lap. On CPU it ends now.
        """
        begun = [*self.begun, (self.begun[-1][0], device.Moment())]
        end = next(number for number in reversed(range(len(begun))) if number == 0 or begun[number][1].passed())
        seconds: dict[str, float] = {}
        for (phase, moment), (_, following) in pairwise(begun[: end + 1]):
            seconds[phase] = seconds.get(phase, 0.0) + following.since(moment)
        self.begun = begun[end:]
        return seconds


def build_profiler(run_dir: Path) -> torch.profiler.profile:
    """A profiler that writes one trace, profile/trace.json, of the steps after the warm-up."""
    path = run_dir / "profile" / "trace.json"

    def write(done: torch.profiler.profile) -> None:
        with spared(str(path)):
            path.parent.mkdir(exist_ok=True)
            done.export_chrome_trace(str(path))

    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=_WAIT, warmup=_WARM, active=PROFILED - _WAIT - _WARM, repeat=1),
        on_trace_ready=write,
    )
