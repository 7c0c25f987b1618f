"""The evaluation of a checkpoint on its own: all tasks of a configuration, one after the other."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nvlm.config.mapping import to_mapping
from nvlm.config.values import Config, problem
from nvlm.evaluate.asking import longest
from nvlm.evaluate.kept import Kept
from nvlm.evaluate.score import folder_of, score_of, told, unanswered
from nvlm.evaluate.task import evaluate
from nvlm.evaluate.tasks import Task, build_task
from nvlm.generate.generator import Generator, build_generator
from nvlm.inputs import identity
from nvlm.processes import groups

# Keys of the model that change no answer: where files are, and how tiles are spread and encoded (always exactly).
_FREE = ("llm.tokenizer", "vision.balance", "vision.tiles_per_call", "vision.graph", "tiling.resize")


def evaluate_checkpoint(config: Config, root: Path, checkpoint: Path, step: int) -> None:
    """Ask the tasks of config.evaluate, in process groups of their own. Results go into `root`, and to standard output.
    `checkpoint`: where the weights are that config.init names, after `step` steps. Raises ConfigError."""
    with groups.distributed(config.parallel, config.seed, config.train.threads) as device:
        with contextlib.redirect_stdout(sys.stderr):
            model = build_generator(config, device)
        for name in config.evaluate.tasks:
            task = build_task(name, config)
            assert task is not None, "checked before the start"
            _evaluate(model, task, root, checkpoint, step)


def _evaluate(model: Generator, task: Task, root: Path, checkpoint: Path, step: int) -> None:
    began = time.monotonic()
    folder = folder_of(root, task.name, step)
    with contextlib.ExitStack() as held:
        kept = Kept(folder, definition(model.config, task))
        groups.raised_together(lambda: held.enter_context(kept.locked()))
        progress = held.enter_context(_shown(task.name))
        answered = evaluate(model, task, kept, progress)
        if not groups.is_first_rank():
            return
        if not answered.rows:
            got = f"no question with a reference answer{unanswered(answered.unanswered)}"
            raise problem(f"task={task.name}", got, "questions whose answers are known", "another file of questions")
        rows = list(answered.rows.values())
        score = score_of(rows, task.name, task.config.metric, step, str(checkpoint), len(answered.unanswered))
        kept.finish(rows, score)
    print(f"{score.line()} questions={score.whole.count} seconds={time.monotonic() - began:.0f}")
    for line in told(score, answered.unanswered):
        print(f"  {line}")
    print(f"answers and score: {folder}", flush=True)


def definition(config: Config, task: Task) -> dict[str, Any]:
    """What determines the answers, besides the questions: the weights by their content, the model that is built around
    them, the task without its metric, and what makes a prompt of a question."""
    weights, values = identity.of_first_weights(config), to_mapping(config)
    asked = {name: value for name, value in asdict(task.config).items() if name != "metric"}
    data = {name: getattr(config.data, name) for name in ("system", "tokenize", "max_pixels")}
    return {
        "checkpoint": weights.digest if weights else None,
        "task": asked | {"max_new_tokens": longest(task, config)},
        "examples": {"shots": task.shots} | ({"split": task.examples.split, "seed": config.seed} if task.shots else {}),
        "data": data,
        "precision": {"name": config.precision.name},
        "peft": {"scale": config.peft.scale},
    } | {
        group: {key: value for key, value in values[group].items() if f"{group}.{key}" not in _FREE}
        for group in ("arch", "llm", "vision", "tiling")
    }


@contextlib.contextmanager
def _shown(name: str):
    """A bar on standard error, on the first rank; yields the function that moves it."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    hidden = not (groups.is_first_rank() and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
