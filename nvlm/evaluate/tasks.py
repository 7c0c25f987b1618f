"""The tasks that a configuration asks, with their questions. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nvlm.config.task import TaskConfig
from nvlm.config.values import Config, problem
from nvlm.data.sources.registry import build_records
from nvlm.metrics.registry import METRICS
from nvlm.tasks.files import read_task
from nvlm.tasks.question import Questions
from nvlm.tasks.records import RecordQuestions

RECORDS = "records"


@dataclass(frozen=True, slots=True)
class Task:
    """The first `count` of `questions`, which the task `config` asks."""

    config: TaskConfig
    questions: Questions
    count: int

    @property
    def name(self) -> str:
        """The name of its folder, and in messages."""
        return self.config.name

    @property
    def of_records(self) -> bool:
        """Whether its questions are records of a data source."""
        return self.config.layout == RECORDS


def build_task(name: str, config: Config) -> Task | None:
    """The task `name` as `config.evaluate` asks it; None if its questions are held-out records and there are none.
    Raises ConfigError."""
    task, questions = read_task(name), None
    if task.layout == RECORDS:
        records = build_records(config.data, config.seed, heldout=True)
        questions = None if records is None else RecordQuestions(records)
        task = replace(task, metric=_metric(config) or task.metric)
    if questions is None:
        return None
    most = config.evaluate.questions
    return Task(task, questions, len(questions) if most is None else min(most, len(questions)))


def _metric(config: Config) -> str | None:
    metric = config.evaluate.metric
    if metric is not None and metric not in METRICS:
        raise problem("evaluate.metric", metric, f"one of {', '.join(METRICS)}", "evaluate.metric=exact_match")
    return metric
