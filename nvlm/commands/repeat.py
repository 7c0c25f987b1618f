"""The command that repeats a run, from its configuration alone."""

from __future__ import annotations

import shlex
from functools import cache

from nvlm.commands.compose import CONF, unchecked_values
from nvlm.config.mapping import to_mapping
from nvlm.config.values import Config
from nvlm.report.cells import shown
from nvlm.runs.ownership import flat

# Groups whose files are known by a value of the configuration. The others have the values of a default run.
_GROUPS = {
    "arch": "arch.name",
    "llm": "llm.name",
    "vision": "vision.name",
    "data": "data.source",
    "stage": "stage.name",
    "peft": "peft.name",
    "precision": "precision.name",
    "logging": "logging.name",
}
_UNTOLD = ("name", "resume", "dry_run")


def command(config: Config) -> str | None:
    """The line of launch/train.py that gives `config`, but for its name; None if it has keys that no file of conf/ has,
    such as the sources of a blend."""
    values = flat(to_mapping(config))
    chosen = tuple(f"{group}={values[key]}" for group, key in _GROUPS.items() if _is_file(group, values[key]))
    base = _composed(chosen)
    if values.keys() - base.keys():
        return None
    differing = [key for key, value in values.items() if not _same(base[key], value) and key not in _UNTOLD]
    words = [f"{key}={shown(values[key])}" for key in differing]
    told = [word for word in chosen if word not in _DEFAULT]
    return f"python launch/train.py {shlex.join([*told, *words])}"


_DEFAULT = ("llm=tiny", "vision=tiny", "data=pages", "stage=sft", "peft=none", "precision=bf16", "logging=none")


def _is_file(group: str, name: object) -> bool:
    return isinstance(name, str) and (CONF / group / f"{name}.yaml").is_file()


@cache
def _composed(words: tuple[str, ...]) -> dict[str, object]:
    """The values that `words` alone give."""
    return flat(unchecked_values(*words))


def _same(written: object, value: object) -> bool:
    """Whether a value as conf/ has it is that of a configuration: YAML reads 1e-8 as text."""
    try:
        return written == value or (isinstance(value, float) and float(written) == value)
    except (TypeError, ValueError):
        return False
