"""The evaluation of a run: losses before its first step, losses and scores after its last one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from nvlm.config.values import Config
from nvlm.data.sources.registry import Records, build_records
from nvlm.evaluate.asking import Task
from nvlm.evaluate.gallery import gallery
from nvlm.evaluate.losses import FILE, add_losses, measure, read_losses, told_losses
from nvlm.evaluate.report import write_report
from nvlm.evaluate.score import folder_of, remove, score_of, told, unanswered, write
from nvlm.evaluate.task import evaluate
from nvlm.generate.generator import Generator
from nvlm.processes import groups
from nvlm.runs.sinks import say, spared
from nvlm.tasks.files import read_task
from nvlm.tasks.records import RecordQuestions
from nvlm.train.loop import Evaluation
from nvlm.train.step import Trainer


def evaluation_of(config: Config, run_dir: Path, started: float) -> Evaluation | None:
    """A function for the training loop to call before its first step and after its last one; None if there is nothing
    to evaluate. `started`: time.time() at launch, for the last line."""
    wanted = config.evaluate
    if not wanted.questions and not wanted.losses:
        return None

    def evaluation(trainer: Trainer, step: int, alive: Callable[[], None]) -> dict[str, float]:
        last = step == config.train.steps
        records = build_records(config.data, config.seed, heldout=True) if last or wanted.losses else None
        if records is None:
            return {}
        found = _losses(trainer, records, config, run_dir, step, alive) if wanted.losses else {}
        return found | (_scores(trainer, records, config, run_dir, started, alive) if last and wanted.questions else {})

    return evaluation


def _losses(
    trainer: Trainer, records: Records, config: Config, run_dir: Path, step: int, alive: Callable[[], None]
) -> dict[str, float]:
    found = measure(trainer, records, config, alive)
    if groups.is_first_rank():
        print(told_losses(found, step))
        with spared(f"{run_dir / FILE}"):
            add_losses(run_dir, step, found)
    return {f"heldout/loss/{name}": one.loss for name, one in found.items() if one.loss is not None}


def _scores(
    trainer: Trainer, records: Records, config: Config, run_dir: Path, started: float, alive: Callable[[], None]
) -> dict[str, float]:
    step = config.train.steps
    task = Task(read_task("heldout"), RecordQuestions(records), min(config.evaluate.questions, len(records)))
    model = Generator(config, trainer.pipeline, trainer.vision, trainer.device)
    answered = evaluate(model, task, alive)
    if not groups.is_first_rank():
        return {}
    if not answered.rows:
        say(f"task {task.config.name}: no question with a reference answer{unanswered(answered.unanswered)}")
        return {}
    rows = list(answered.rows.values())
    checkpoint, name = f"{run_dir}/checkpoints/step_{step:08d}", task.config.name
    score = score_of(rows, name, task.config.metric, step, checkpoint, len(answered.unanswered))
    (run_dir / "report.html").unlink(missing_ok=True)  # an older page, which must not remain if the disk is full
    remove(folder := folder_of(run_dir, name, step))
    with spared(f"{run_dir}: the evaluation's files"):
        write(folder, rows, score)
        write_report(run_dir, config, gallery(model, task, answered.rows), score, read_losses(run_dir))
    for line in told(score, answered.unanswered):
        print(line)
    print(f"{score.line()} seconds={time.time() - started:.0f}")
    categories = {f"{name}/{category}": one.mean for category, one in score.by_category.items()}
    return {f"{name}/{score.metric}": score.whole.mean} | categories
