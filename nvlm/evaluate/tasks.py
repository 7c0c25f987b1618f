"""The tasks that a configuration asks, with their questions. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from nvlm.config.task import TaskConfig
from nvlm.config.values import Config, problem
from nvlm.data.record import BadRecord, one_record
from nvlm.data.sources.registry import build_records, first_records
from nvlm.metrics.line import Line
from nvlm.metrics.needs import lacking
from nvlm.metrics.registry import METRICS
from nvlm.tasks.files import read_task
from nvlm.tasks.question import Question, Questions
from nvlm.tasks.records import RecordQuestions, question_of
from nvlm.tasks.registry import RECORDS, build_questions, check_folder, folder_of
from nvlm.tasks.release import KEY
from nvlm.tasks.shots import Examples, examples_of, with_examples

_TRIED = 10  # questions of which one is looked at


@dataclass(frozen=True, slots=True)
class Task:
    """The first `count` of `questions`, which the task `config` asks, each after `shots` of the `examples`."""

    config: TaskConfig
    questions: Questions
    count: int
    shots: int = 0
    examples: Examples | None = None

    @property
    def name(self) -> str:
        """The name of its folder, and in messages."""
        return label(self.config.name, self.shots)

    @property
    def of_records(self) -> bool:
        """Whether its questions are records of a data source."""
        return self.config.layout == RECORDS

    def question(self, index: int) -> Question:
        """Question `index` after its examples. Raises BadRecord."""
        question = self.questions[index]
        if self.examples is None:
            return question
        name = self.questions.name(index)
        return with_examples(question, self.examples.before(index, name, question.category, self.shots))


def label(name: str, shots: int) -> str:
    """The name of the task `name` with so many examples."""
    return f"{name}_{shots}shot" if shots else name


def build_task(name: str, config: Config) -> Task | None:
    """The task `name` as `config.evaluate` asks it; None if its questions are held-out records and there are none.
    Raises ConfigError."""
    task, shots = read_task(name), config.evaluate.shots
    if task.layout != RECORDS:
        folder = _folder(task, config)
        questions = build_questions(task, folder)
        examples = examples_of(task, folder, questions, config.seed) if shots else None
        return Task(task, questions, _count(questions, config), shots, examples)
    records = build_records(config.data, config.seed, heldout=True)
    if records is None:
        return None
    questions = RecordQuestions(records)
    task = replace(task, metric=_metric(config) or task.metric)
    _check_metric(task.metric, questions)
    return Task(task, questions, _count(questions, config), shots, _of_training(config) if shots else None)


def _check_metric(metric: str, questions: Questions) -> None:
    """Raise ConfigError if the first question that can be read lacks what `metric` needs."""
    for index in range(min(_TRIED, len(questions))):
        try:
            with one_record():
                first = questions[index]
        except BadRecord:
            continue
        return _check_serves(first, questions.name(index), metric)


def _check_serves(question: Question, name: str, metric: str) -> None:
    fields = {key: getattr(question, key) for key in ("references", "options", "type", "category")}
    if lack := lacking(metric, Line(id="", answer="", **fields)):
        got = f"{metric}, and {name} with {lack.got} as {lack.key}"
        raise problem("evaluate.metric", got, f"{lack.key}: {lack.expected}", "evaluate.metric=exact_match")


def check_names(config: Config) -> None:
    """Raise ConfigError if config.evaluate names a task or a metric that does not exist."""
    _metric(config)
    for name in config.evaluate.tasks:
        read_task(name)


def check_tasks(config: Config) -> None:
    """Raise ConfigError if files of a benchmark are missing, or if a source's first readable held-out record lacks what
    the metric needs."""
    for task in map(read_task, config.evaluate.tasks):
        if task.layout != RECORDS:
            check_folder(task, _folder(task, config))
        elif metric := _metric(config):
            _check_first(config, metric)


def _check_first(config: Config, metric: str) -> None:
    for source in first_records(config.data.source, heldout=True):
        for name, read in islice(source.records, _TRIED):
            try:
                with one_record():
                    first = question_of(read())
            except BadRecord:
                continue
            _check_serves(first, name, metric)
            break


def _folder(task: TaskConfig, config: Config) -> Path:
    path = config.evaluate.path
    if path is None:
        raise problem(KEY, "nothing", f"the folder of {task.name}'s files", f"{KEY}=FOLDER")
    return folder_of(task, Path(path))


def _of_training(config: Config) -> Examples:
    """Examples from the records that the run is trained on."""
    return Examples(RecordQuestions(build_records(config.data, config.seed)), "training", False, config.seed, {})


def _count(questions: Questions, config: Config) -> int:
    most = config.evaluate.questions
    return len(questions) if most is None else min(most, len(questions))


def _metric(config: Config) -> str | None:
    metric = config.evaluate.metric
    if metric is not None and metric not in METRICS:
        raise problem("evaluate.metric", metric, f"one of {', '.join(METRICS)}", "evaluate.metric=exact_match")
    return metric
