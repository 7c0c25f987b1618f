"""The evaluation at the end of a run: scores on held-out records, printed on the console."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nvlm.config.values import Config
from nvlm.data.sources.registry import build_records
from nvlm.evaluate.heldout import Score, evaluate
from nvlm.processes import groups
from nvlm.train.loop import Evaluation
from nvlm.train.step import Trainer


def closing_evaluation(config: Config, run_dir: Path, started: float) -> Evaluation | None:
    """A function for the training loop to call after its last step; None without questions. `started`: time.time() at
    launch, for the last line."""
    if not config.evaluate.questions:
        return None

    def evaluation(trainer: Trainer, alive: Callable[[], None]) -> dict[str, float]:
        records = build_records(config.data, config.seed, heldout=True)
        if records is None:
            return {}
        score = evaluate(trainer.pipeline, trainer.vision, records, config, run_dir, trainer.device, alive)
        if groups.is_first_rank():
            _tell(score, time.time() - started)
        kinds = {f"heldout/{kind}": share for kind, share in score.by_kind.items()}
        return {"heldout/exact_match": score.exact_match} | kinds

    return evaluation


def _tell(score: Score, seconds: float) -> None:
    print("  ".join(f"{kind} {share:.2f}" for kind, share in score.by_kind.items()))
    if score.unanswered:
        print(f"not scored, no reference answer: {shortened(score.unanswered)}")
    print(f"heldout exact_match={score.exact_match:.2f} seconds={seconds:.0f}")


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The number of `names` and the first of them."""
    more = ", ..." if len(names) > most else ""
    return f"{len(names)} ({', '.join(names[:most])}{more})"
