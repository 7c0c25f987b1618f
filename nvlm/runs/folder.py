"""A run folder: its configuration and its checkpoints. Imports no torch.

It holds `config.yaml` and `checkpoints/`, with step folders, `frozen/`, `latest`, the name of the newest step, and
`best`, that of the step which scored best; perhaps also `encoder.safetensors`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nvlm.config.fields import named
from nvlm.config.mapping import from_mapping
from nvlm.config.values import Config, ConfigError, problem
from nvlm.runs.earlier import as_written_now

FROZEN = "frozen"
LATEST, BEST = "latest", "best"  # files in checkpoints/ that name a step folder
ENCODER = "encoder.safetensors"  # an encoder that learned in an earlier stage and does not learn in this run
INPUTS = "inputs.json"  # identifies the run's inputs by their content


def has_run(run_dir: Path) -> bool:
    """Whether `run_dir` is a run folder, that is, whether a run wrote its config.yaml."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return False
    groups = ("arch", "llm", "vision", "tiling", "data", "stage", "train", "optim")
    return isinstance(values, dict) and all(isinstance(values.get(group), dict) for group in groups)


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return _marked(run_dir / "checkpoints" / LATEST)


def best(run_dir: Path) -> Path | None:
    """The checkpoint of a run that scored best, or None if the run chooses none."""
    return _marked(run_dir / "checkpoints" / BEST)


def _marked(mark: Path) -> Path | None:
    """The step folder that the file `mark` names; None if there is no such file."""
    if not mark.is_file():
        return None
    folder = mark.parent / mark.read_text().strip()
    if not folder.is_dir():
        present = [other.name for other in steps_of(mark.parent)]
        fix = f"write {present[-1]} into it" if present else "delete it to start over"
        raise problem(str(mark), folder.name, f"a step in the folder ({', '.join(present) or 'there are none'})", fix)
    return folder


def steps_done(run_dir: Path) -> int:
    """The step of a run's newest complete checkpoint; 0 without one."""
    folder = latest(run_dir)
    return step_of(folder) if folder else 0


def step_of(folder: Path) -> int:
    """The step of a step folder."""
    return int(folder.name.removeprefix("step_"))


def steps_of(root: Path) -> list[Path]:
    """The step folders in `root`, oldest first."""
    return sorted(root.glob("step_*"))


MASTER = "optimizer.state.param."
"""Prefix of the keys of fp32 master weights in a checkpoint; the weight's name follows."""


def weight_keys(keys: Iterable[str]) -> dict[str, str]:
    """Maps each weight's name to its key in a checkpoint with tensors `keys`: its own name or, if the weight was kept
    in FP8 and so is not stored, the key of its fp32 copy."""
    keys = set(keys)
    weights = {key: key for key in keys if not key.startswith("optimizer.")}
    masters = {key.removeprefix(MASTER): key for key in keys if key.startswith(MASTER)}
    return masters | weights


def find_checkpoint(path: Path, key: str) -> Path:
    """The step folder that `path` refers to: itself, the one that checkpoints/best names, or the newest in a run
    folder. `key`: the setting it came from."""
    if path.parent.name == "checkpoints" and path.name.startswith("step_") and path.is_dir():
        return path
    if path.parent.name == "checkpoints" and path.name in (BEST, LATEST) and (folder := _marked(path)):
        return folder
    if folder := latest(path):
        return folder
    runs = sorted(str(other.parent.parent) for other in path.parent.glob("*/checkpoints/latest"))
    fix = f"{key}={runs[-1]}" if runs else f"{key}=RUN"
    raise problem(key, named(path), "a run folder with a checkpoint, or one of its checkpoints/step_N", fix)


def read_run_config(folder: Path) -> Config:
    """The configuration of the run that the step folder `folder` belongs to."""
    path = folder.parent.parent / "config.yaml"
    if not path.is_file():
        raise problem(str(path), "no such file", "the configuration written by the run", "copy the whole run folder")
    try:
        return from_mapping(Config, as_written_now(OmegaConf.to_container(OmegaConf.load(path))))
    except ConfigError as error:  # written by an older version, or edited
        raise ConfigError(f"{path}: {error}") from None
