"""The evaluation of a run: losses before its first step, losses and scores after its last one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nvlm.config.values import Config
from nvlm.data.sources.registry import Records, build_records
from nvlm.evaluate.heldout import Score, evaluate
from nvlm.evaluate.losses import FILE, add_losses, measure, told
from nvlm.processes import groups
from nvlm.runs.sinks import spared
from nvlm.train.loop import Evaluation
from nvlm.train.step import Trainer


def evaluation_of(config: Config, run_dir: Path, started: float) -> Evaluation | None:
    """A function for the training loop to call before its first step and after its last one; None if there is nothing
    to evaluate. `started`: time.time() at launch, for the last line."""
    asked = config.evaluate
    if not asked.questions and not asked.losses:
        return None

    def evaluation(trainer: Trainer, step: int, alive: Callable[[], None]) -> dict[str, float]:
        last = step == config.train.steps
        records = build_records(config.data, config.seed, heldout=True) if last or asked.losses else None
        if records is None:
            return {}
        found = _losses(trainer, records, config, run_dir, step, alive) if asked.losses else {}
        return found | (_scores(trainer, records, config, run_dir, started, alive) if last and asked.questions else {})

    return evaluation


def _losses(
    trainer: Trainer, records: Records, config: Config, run_dir: Path, step: int, alive: Callable[[], None]
) -> dict[str, float]:
    found = measure(trainer, records, config, alive)
    if groups.is_first_rank():
        print(told(found, step))
        with spared(f"{run_dir / FILE}"):
            add_losses(run_dir, step, found)
    return {f"heldout/loss/{name}": one.loss for name, one in found.items() if one.loss is not None}


def _scores(
    trainer: Trainer, records: Records, config: Config, run_dir: Path, started: float, alive: Callable[[], None]
) -> dict[str, float]:
    score = evaluate(trainer.pipeline, trainer.vision, records, config, run_dir, trainer.device, alive)
    if groups.is_first_rank():
        _tell(score, time.time() - started)
    kinds = {f"heldout/{kind}": share for kind, share in score.by_kind.items()}
    return {"heldout/exact_match": score.exact_match} | kinds


def _tell(score: Score, seconds: float) -> None:
    print("  ".join(f"{kind} {share:.2f}" for kind, share in score.by_kind.items()))
    if score.unanswered:
        print(f"not scored, no reference answer: {shortened(score.unanswered)}")
    print(f"heldout exact_match={score.exact_match:.2f} seconds={seconds:.0f}")


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The number of `names` and the first of them."""
    more = ", ..." if len(names) > most else ""
    return f"{len(names)} ({', '.join(names[:most])}{more})"
