"""The evaluate command's arguments for a checkpoint: its own keys, and the configuration of the model.

Imports no torch, so that mistakes are reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvlm.commands.compose import check_overrides
from nvlm.commands.words import own_words
from nvlm.config.data import Blend, DataConfig
from nvlm.config.mapping import to_mapping
from nvlm.config.values import Config, problem
from nvlm.evaluate.tasks import build_task, check_names, check_tasks
from nvlm.generate.config import config_of
from nvlm.inputs.check import check_weights
from nvlm.runs.folder import find_checkpoint, read_run_config, step_of
from nvlm.runs.place import check_place
from nvlm.tasks.files import read_task
from nvlm.tasks.registry import RECORDS

KEYS = ("checkpoint", "task", "limit", "shots", "metric", "out")
_GROUPS = ("arch", "llm", "vision", "stage", "peft")  # what a checkpoint was made with


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The tasks of config.evaluate, asked of the model of `config`. `root`: the folder of the results; `checkpoint`:
    the step folder, and its step."""

    config: Config
    root: Path
    checkpoint: Path
    step: int


def parse(arguments: Sequence[str]) -> Request:
    """The request of a command line. Raises ConfigError."""
    own, others = own_words(arguments, KEYS)
    if not own.get("checkpoint"):
        expected = "a run folder, its checkpoints/best, or one of its checkpoints/step_N"
        raise problem("checkpoint", "nothing", expected, "checkpoint=RUN, or answers=FILE metric=NAME")
    folder = find_checkpoint(Path(own["checkpoint"]).resolve(), "checkpoint")
    asked, words = _asked(own, others)
    before, instead = read_run_config(folder), {"evaluate": asked}
    words = _model_words(words, before, folder)
    if any(word.startswith("data=") for word in words):
        instead["data"], words = _source(words, before.data)
    config = config_of(folder, words, (*KEYS, "answers", "data", "task"), instead)
    check_weights(config)
    root = Path(own["out"]).expanduser() if own.get("out") else folder.parent.parent / "evaluation"
    return Request(config=config, root=root, checkpoint=folder, step=step_of(folder))


def _asked(own: dict[str, str], others: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The group evaluate, instead of the run's, and the words for the other groups."""
    tasks = tuple(filter(None, own.get("task", "heldout").split(",")))
    path, words = None, list(others)
    if any(read_task(name).layout != RECORDS for name in tasks):
        path, words = _taken("data.path", others)
    if own.get("metric") and all(read_task(name).layout != RECORDS for name in tasks):
        expected = "none, since a benchmark has its own; answers=FILE scores its answers by another"
        raise problem("metric", own["metric"], expected, f"leave metric={own['metric']} out")
    asked = {
        "every": 0,
        "best": None,
        "tasks": tasks,
        "path": path,
        "shots": _count(own, "shots", 0, 0),
        "metric": own.get("metric"),
        "losses": 0,
        "questions": _count(own, "limit", 1, None),
        "batch": 50,
        "tokens": 32768,
        "max_new_tokens": None,
        "gallery": 0,
    }
    return asked, words


def check(request: Request) -> None:
    """Raise ConfigError if a task cannot be asked: its questions are not there, or its metric is unknown. Likewise if
    the results cannot be written."""
    check_place(request.root, "out")
    check_names(request.config)
    check_tasks(request.config)
    for name in request.config.evaluate.tasks:
        if build_task(name, request.config) is None:
            got = f"no held-out records in data={request.config.data.source.source}"
            raise problem(f"task={name}", got, "some", "data=jsonl data.heldout_path=FILE")


def _count(own: dict[str, str], key: str, least: int, default: int | None) -> int | None:
    text = own.get(key)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise problem(key, repr(text), f"a number of questions, at least {least}", f"{key}={least}")
    return int(text)


def _taken(key: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The last value of `key` in `words`, and the other words."""
    values = [word.partition("=")[2] for word in words if word.partition("=")[0] == key]
    return (values[-1] if values else None), [word for word in words if word.partition("=")[0] != key]


def _model_words(words: Sequence[str], before: Config, folder: Path) -> list[str]:
    """`words` without groups that a checkpoint was made with, as long as they are named rightly."""
    kept = []
    for word in words:
        group, _, name = word.partition("=")
        if group not in _GROUPS:
            kept.append(word)
        elif name != (made := getattr(before, group).name):
            raise problem(group, name, f"{made}, which {folder} was made with", f"leave {word} out, or checkpoint=RUN")
    return kept


def _source(words: Sequence[str], before: DataConfig) -> tuple[dict[str, Any], list[str]]:
    """The data group for the source that `words` choose with data=..., and the words that do not set its keys.

    How records become prompts stays as in the run.
    """
    of_data = [word for word in words if word.startswith(("data=", "data."))]
    (composed,) = check_overrides([*of_data, "dry_run=true"], KEYS)  # a dry run needs no training records
    source = to_mapping(composed.data)
    kept = to_mapping(replace(before, source=composed.data.source))
    typed = {word.partition("=")[0].removeprefix("data.") for word in of_data}
    values = {key: source[key] if key in typed else value for key, value in kept.items()}
    return _with_path(values, composed.data), [word for word in words if word not in of_data]


def _with_path(values: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    """`values` with a path of training records for each source, which is required, but not read here."""
    if isinstance(data.source, Blend):
        parts = {name: _filled(part) for name, part in values["sources"].items()}
        return values | {"sources": parts}
    if "heldout_path" in values and not values["heldout_path"]:
        raise problem("data.heldout_path", "nothing", "the records that are asked", "data.heldout_path=FILE")
    return _filled(values)


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"path": values.get("path") or values["heldout_path"]} if "heldout_path" in values else values
