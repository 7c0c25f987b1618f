"""The evaluation of a run while it trains: scores every `evaluate.every` steps and after the last one, losses on
held-out records before the first step, too.

It does not disturb the run: nothing here draws from a generator that training draws from, and what a forward pass
changes in the model is put back. A task that cannot be evaluated costs a line, not the run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from nvlm.config.values import Config, ConfigError
from nvlm.data.sources.registry import build_records
from nvlm.evaluate.gallery import gallery
from nvlm.evaluate.kept import clear
from nvlm.evaluate.looks import explain_some
from nvlm.evaluate.losses import FILE, add_losses, measure, read_losses, told_losses
from nvlm.evaluate.report import write_report
from nvlm.evaluate.score import SCORE, Score, folder_of, score_of, told, unanswered, write
from nvlm.evaluate.stop import Stop, Stopped
from nvlm.evaluate.task import Answered, evaluate
from nvlm.evaluate.tasks import Task, build_task, label
from nvlm.generate.generator import Generator
from nvlm.processes import groups
from nvlm.runs.folder import best, step_of
from nvlm.runs.sinks import reason, say, spared
from nvlm.train.evaluations import Measured
from nvlm.train.step import Trainer, settle


def evaluation_of(config: Config, run_dir: Path, started: float) -> During | None:
    """What measures the run; None if there is nothing to measure. `started`: time.time() at launch, for the last
    line."""
    wanted = config.evaluate
    return During(config, run_dir, started) if wanted.questions != 0 or wanted.losses else None


class During:
    """The evaluations of one run (as nvlm.train.evaluations.Evaluation)."""

    def __init__(self, config: Config, run_dir: Path, started: float) -> None:
        self.config, self.run_dir, self.started = config, run_dir, started
        self.asked = config.evaluate
        self.asks = self.asked.questions != 0
        self.root = run_dir / "evaluation"
        self.tasks: dict[str, Task | None] = {}

    def due(self, step: int) -> bool:
        """Whether something is measured after `step` steps."""
        return bool(self.asked.losses) if step == 0 else step == self.config.train.steps or self._between(step)

    def missing(self, step: int) -> bool:
        """Whether a task that was due after `step` steps has no score, because the run ended meanwhile."""
        if not (self.asks and self._between(step)):
            return False
        scores = [self._folder(name, step) / SCORE for name in self.asked.tasks]
        return groups.from_first_rank(not all(score.is_file() for score in scores))

    def __call__(self, trainer: Trainer, step: int, alive: Callable[[], None], stop: Stop) -> Measured | None:
        """What is due after `step` steps."""
        settle(trainer)
        try:
            losses = self._losses(trainer, step, alive, stop) if self.asked.losses else {}
            scores = self._scores(trainer, step, alive, stop) if self.asks and step else {}
        except Stopped:
            return None
        logged = {}
        for name, score in scores.items():
            logged[f"{name}/{score.metric}"] = score.whole.mean
            logged |= {f"{name}/{category}": one.mean for category, one in score.by_category.items()}
        return Measured(losses | logged, self._is_best(scores))

    def _between(self, step: int) -> bool:
        every = self.asked.every
        return every > 0 and step > 0 and step % every == 0

    def _folder(self, task: str, step: int) -> Path:
        return folder_of(self.root, label(task, self.asked.shots), step)

    def _losses(self, trainer: Trainer, step: int, alive: Callable[[], None], stop: Stop) -> dict[str, float]:
        """The losses on held-out records by name."""
        records = build_records(self.config.data, self.config.seed, heldout=True)
        if records is None:
            return {}
        found = measure(trainer, records, self.config, alive, stop)
        if groups.is_first_rank():
            print(told_losses(found, step))
            with spared(f"{self.run_dir / FILE}"):
                add_losses(self.run_dir, step, found)
        return {f"heldout/loss/{name}": one.loss for name, one in found.items() if one.loss is not None}

    def _scores(self, trainer: Trainer, step: int, alive: Callable[[], None], stop: Stop) -> dict[str, Score]:
        """The scores by task, on the first rank."""
        model = Generator(self.config, trainer.pipeline, trainer.vision, trainer.device)
        self._remove_stale(step)
        scores: dict[str, Score] = {}
        for name in self.asked.tasks:
            try:
                task = self._task(name)
                answered = task and evaluate(model, task, None, lambda done, total: alive(), stop)
            except ConfigError as error:  # all ranks raise it
                self._say(f"task {name} was not evaluated after step {step}: {error}")
                continue
            if task and answered and groups.is_first_rank():
                scores |= self._result(model, task, answered, step, paged=not scores)
            if task and answered and step == self.config.train.steps and name == self.asked.tasks[0]:
                explain_some(model, task, answered.rows, self.run_dir)
        return scores

    def _task(self, name: str) -> Task | None:
        """The task `name`, built when it is first needed. All ranks raise a ConfigError if one of them cannot."""
        if name not in self.tasks:
            built, failure = None, None
            try:
                built = build_task(name, self.config)
            except (ConfigError, OSError) as error:
                failure = reason(error)
            if failures := [one for one in groups.gather_over_ranks([failure]) if one]:
                raise ConfigError(failures[0])
            self.tasks[name] = built
        return self.tasks[name]

    def _remove_stale(self, step: int) -> None:
        """Delete older results of this step, so that none remain if new ones cannot be written."""
        if groups.is_first_rank():
            with spared(f"{self.root}: older results"):
                for name in self.asked.tasks:
                    clear(self._folder(name, step))
                if step == self.config.train.steps:
                    (self.run_dir / "report.html").unlink(missing_ok=True)

    def _result(self, model: Generator, task: Task, answered: Answered, step: int, paged: bool) -> dict[str, Score]:
        """The task's score by its name, written and told; after the last step, also on the run's page if `paged`."""
        if not answered.rows:
            say(f"task {task.name}: no question with a reference answer{unanswered(answered.unanswered)}")
            return {}
        last, rows = step == self.config.train.steps, list(answered.rows.values())
        checkpoint = str(self.run_dir / "checkpoints" / f"step_{step:08d}")
        score = score_of(rows, task.name, task.config.metric, step, checkpoint, len(answered.unanswered))
        with spared(f"{self.run_dir}: the evaluation's files"):
            write(folder_of(self.root, task.name, step), rows, score)
            if last and paged:
                shown = gallery(model, task, answered.rows)
                write_report(self.run_dir, self.config, shown, score, read_losses(self.run_dir))
        for line in told(score, answered.unanswered):
            print(line)
        print(f"{score.line()} seconds={time.time() - self.started:.0f}" if last else f"step {step}: {score.line()}")
        return {task.name: score}

    def _is_best(self, scores: dict[str, Score]) -> bool:
        """Whether the chosen task's score is above that of the checkpoint that is kept as the best. A collective
        call."""
        if self.asked.best is None:
            return False
        score, better = scores.get(label(self.asked.best, self.asked.shots)), False
        if score is not None:  # on the first rank
            top = self._mean_of_best(score.metric)
            better = top is None or score.whole.mean > top
        return groups.from_first_rank(better)

    def _mean_of_best(self, metric: str) -> float | None:
        """The score of the checkpoint that is kept as the best; None without one, or without its score by `metric`."""
        try:
            kept = best(self.run_dir)
            path = kept and self._folder(self.asked.best, step_of(kept)) / SCORE
            found = json.loads(path.read_text("utf-8")) if path and path.is_file() else {}
            return float(found["mean"]) if found.get("metric") == metric else None
        except (ConfigError, OSError, ValueError, TypeError, AttributeError, KeyError):  # somebody changed these files
            return None

    def _say(self, line: str) -> None:
        if groups.is_first_rank():
            say(f"{line}; training goes on")
