"""Several training stages in one command: an experiment file whose only key is `stages`, a list of experiments.

Each stage is a run of its own, in a folder below the command's, and starts from the checkpoint of the one before it.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from nvlm.commands.compose import CONF
from nvlm.commands.words import SWEEP_FLAGS, parse, plain_words, quoted
from nvlm.config.values import Config, problem

_OWN = "stages."  # stages.NAME.KEY=VALUE: for one stage
_FIRST = ("init.llm", "init.release", "init.checkpoint")  # for the first stage: the others continue


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its experiment's name, the command-line words of its run, and the folder of that run."""

    name: str
    words: tuple[str, ...]
    folder: Path


def stages_of(words: Sequence[str]) -> list[Stage]:
    """The stages that `words` ask for; none if they name no experiment with stages. Raises ConfigError."""
    named = [word for word in words if word.startswith("+experiment=")]
    chosen = str(parse(named[-1]).value()) if named else ""
    names = _listed(chosen)
    flags = [word for word in words if word.startswith("-")]
    if not names or set(flags) - set(SWEEP_FLAGS):  # Hydra answers --help and the like
        return []
    if flags or any(word.startswith("hydra/launcher=") for word in words):
        expected = "one run after the other, on this machine or under torchrun or srun"
        raise problem(named[-1], "stages in a sweep", expected, "leave -m out")
    own = {name: [] for name in names}
    shared, title, place = [], chosen, None
    for word in words:
        key, _, value = word.partition("=")
        if key.startswith(_OWN):
            name, _, rest = key.removeprefix(_OWN).partition(".")
            if name not in own or not rest:
                fix = f"{_OWN}{names[-1]}.train.steps=..."
                raise problem(key, "no stage and key", f"one of {', '.join(names)} and one of its keys", fix)
            own[name].append(f"{rest}={value}")
        elif key == "name":
            title = str(parse(word).value())
        elif key == "hydra.run.dir":
            place = str(parse(word).value())
        elif key != "+experiment":
            shared.append(word)
    return _chain(names, shared, own, title, Path(place or f"runs/{title}"))


def _listed(experiment: str) -> list[str]:
    """The stages in the file of `experiment`."""
    file = CONF / "experiment" / f"{experiment}.yaml"
    values = OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file.is_file() else {}
    return list(values.get("stages", ()))


def _chain(
    names: Sequence[str], shared: Sequence[str], own: dict[str, list[str]], title: str, place: Path
) -> list[Stage]:
    stages: list[Stage] = []
    for name in names:
        folder = place / name
        words = [f"+experiment={name}", f"name={quoted(f'{title}-{name}')}", f"hydra.run.dir={quoted(str(folder))}"]
        given = shared
        if stages:
            given = [word for word in shared if word.partition("=")[0] not in _FIRST]
            words.append(f"init.checkpoint={quoted(str(stages[-1].folder))}")
        stages.append(Stage(name, tuple(words + plain_words([*given, *own[name]])), folder))
    return stages


def check_sequence(stages: Sequence[Stage], configs: Sequence[Config]) -> None:
    """Raise ConfigError if a stage cannot continue the one before it, which has no checkpoint yet."""
    from nvlm.inputs.check import compare_models  # which reads weights: a mistyped key need not wait for it

    for before, stage, one, other in zip(stages, stages[1:], configs, configs[1:]):
        where = f"{stage.name} after {before.name}"
        if one.arch.name != other.arch.name:
            expected, fix = f"{one.arch.name}, as in {before.name}", f"arch={one.arch.name}, for all stages"
            raise problem(f"{where}: arch", f"{other.arch.name}", expected, fix)
        compare_models(other, one, where)
