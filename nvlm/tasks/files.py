"""Tasks by name: conf/task/NAME.yaml. Imports no torch."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

import yaml

from nvlm.config.mapping import from_mapping
from nvlm.config.task import TaskConfig
from nvlm.config.values import problem

_FOLDER = Path(__file__).resolve().parents[2] / "conf" / "task"


def task_names() -> list[str]:
    """The names of all tasks."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def read_task(name: str) -> TaskConfig:
    """The task `name`. Raises ConfigError if there is none."""
    if name not in (known := task_names()):
        near = get_close_matches(name, known, n=1) or ["heldout"]
        raise problem("task", repr(name), f"one of {', '.join(known)}", f"task={near[0]}")
    return from_mapping(TaskConfig, yaml.safe_load((_FOLDER / f"{name}.yaml").read_text("utf-8")), f"task {name}: ")
