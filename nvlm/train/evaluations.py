"""When a run is evaluated, and what it does with the scores. What is measured, the command that trains decides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nvlm.processes.workers import Signals
from nvlm.train import garbage
from nvlm.train.checkpoint.save import Checkpoints
from nvlm.train.guard import Guard
from nvlm.train.metrics import Metrics
from nvlm.train.step import Trainer


@dataclass(frozen=True, slots=True)
class Measured:
    """Scores by name, on the first rank; and on all ranks, whether this is the best checkpoint so far."""

    scores: dict[str, float]
    best: bool = False


class Evaluation(Protocol):
    """What measures a model in training. Its methods are collective calls. Step 0 is before the first step."""

    def due(self, step: int) -> bool:
        """Whether something is measured after `step` steps."""
        ...

    def missing(self, step: int) -> bool:
        """Whether the run ended before what was due after `step` steps was complete."""
        ...

    def __call__(
        self, trainer: Trainer, step: int, alive: Callable[[], None], stop: Callable[[], bool]
    ) -> Measured | None:
        """What is due after `step` steps; None if it was interrupted because `stop` was true on some rank. `alive` is
        called before each batch."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluations:
    """The evaluations of one training loop."""

    evaluation: Evaluation | None
    trainer: Trainer
    signals: Signals
    metrics: Metrics
    checkpoints: Checkpoints
    on_phase: Callable[[int, str], None]

    def before(self, first: int, steps: int, guard: Guard) -> bool:
        """What is due before the step after `first`: at the start, and after the end of a run in an evaluation. False
        if it was interrupted."""
        if first == steps or self.evaluation is None:
            return True
        wanted = self.evaluation.due(0) if first == 0 else self.evaluation.missing(first)
        return not wanted or self(first, guard)

    def due(self, step: int) -> bool:
        """Whether the run is evaluated after `step`."""
        return self.evaluation is not None and self.evaluation.due(step)

    def __call__(self, step: int, guard: Guard) -> bool:
        """Evaluate after `step` steps, log the scores, and keep the best checkpoint. False if a signal ended it."""
        assert self.evaluation is not None
        self.checkpoints.poll(wait=True)  # a failure from here on must not cost the checkpoint of this step
        alive = functools.partial(self.on_phase, step, "evaluate")
        alive()
        with garbage.automatic():
            measured = self.evaluation(self.trainer, step, alive, lambda: bool(self.signals.came))
        if measured is None:
            if self.metrics.active:
                print(f"the evaluation after step {step} was interrupted; resume=auto repeats it")
            return False
        self.metrics.scores(step, measured.scores)
        if measured.best and not guard.bad_in_row:  # after a bad step the weights may be at fault
            self.checkpoints.keep_best(self.trainer, step, guard.numbers())
        return True
