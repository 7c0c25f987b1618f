"""Several training stages in one command: a file of conf/pipeline, which lists experiments.

    stages: [llava_ov_1_7b, llava_ov_1.5_7b]     # the experiments, in this order
    words: [llm=qwen2-7b]                        # command-line words for all of them; may be left out

Each stage is a run of its own, in a folder below the command's, and starts from the checkpoint of the one before it.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from rich.table import Table

from nvlm.commands.compose import CONF, unknown_value
from nvlm.commands.words import SWEEP_FLAGS, parse, plain_words, quoted
from nvlm.config.values import Config, problem
from nvlm.runs.folder import has_run, steps_done

_NAMES = ("+pipeline", "+experiment")  # a pipeline may be asked for as an experiment
_OWN = "stages."  # stages.NAME.KEY=VALUE: for one stage
_FIRST = ("init.llm", "init.vision", "init.release", "init.checkpoint")  # for the first stage: the others continue


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its experiment's name, the command-line words of its run, and the folder of that run."""

    name: str
    words: tuple[str, ...]
    folder: Path


def stages_of(words: Sequence[str]) -> list[Stage]:
    """The stages that `words` ask for; none if they name no pipeline. Raises ConfigError."""
    named = [word for word in words if word.partition("=")[0] in _NAMES]
    chosen = str(parse(named[-1]).value()) if named else ""
    listed = _listed(chosen)
    flags = [word for word in words if word.startswith("-")]
    if not listed and any(word.startswith("+pipeline=") for word in named):
        raise unknown_value("pipeline", chosen)
    if not listed or set(flags) - set(SWEEP_FLAGS):  # Hydra answers --help and the like
        return []
    if flags or any(word.startswith("hydra/launcher=") for word in words):
        expected = "one run after the other, on this machine or under torchrun or srun"
        raise problem(named[-1], "stages in a sweep", expected, "leave -m out")
    names = list(listed["stages"])
    own = {name: [] for name in names}
    shared, title, place = [], chosen, None
    for word in (*listed.get("words", ()), *words):
        key, _, value = word.partition("=")
        if key.startswith(_OWN):
            name, rest = _of_stage(key, names)
            own[name].append(f"{rest}={value}")
        elif key == "name":
            title = str(parse(word).value())
        elif key == "hydra.run.dir":
            place = str(parse(word).value())
        elif key not in _NAMES:
            shared.append(word)
    return _chain(names, shared, own, title, Path(place or f"runs/{title}"))


def _listed(pipeline: str) -> Mapping[str, Sequence[str]]:
    """The file of `pipeline`; empty if there is none."""
    file = CONF / "pipeline" / f"{pipeline}.yaml"
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file.is_file() else {}


def _of_stage(key: str, names: Sequence[str]) -> tuple[str, str]:
    """The stage and its key in stages.NAME.KEY; names of stages may have dots."""
    for name in names:
        if (rest := key.removeprefix(f"{_OWN}{name}.")) not in (key, ""):
            return name, rest
    fix = f"{_OWN}{names[-1]}.train.steps=..."
    raise problem(key, "no stage and key", f"one of {', '.join(names)} and one of its keys", fix)


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
    from nvlm.inputs.check import check_parent, compare_models  # reads weights: a mistyped key need not wait for it

    for before, stage, one, other in zip(stages, stages[1:], configs, configs[1:]):
        where = f"{stage.name} after {before.name}"
        if one.arch.name != other.arch.name:
            expected, fix = f"{one.arch.name}, as in {before.name}", f"arch={one.arch.name}, for all stages"
            raise problem(f"{where}: arch", f"{other.arch.name}", expected, fix)
        check_parent(other, one, where)
        compare_models(other, one, where)


def progress(stages: Sequence[Stage], configs: Sequence[Config]) -> Table:
    """What each stage trains, and how many of its steps are done."""
    table = Table(title="stages", title_justify="left")
    for heading in ("stage", "trains", "steps", "state", "folder"):
        table.add_column(heading, justify="right" if heading == "steps" else "left", overflow="fold")
    for stage, config in zip(stages, configs, strict=True):
        done, steps = steps_done(stage.folder), config.train.steps
        state = "done" if done >= steps else "begun" if done or has_run(stage.folder) else "to do"
        trains = ", ".join(group for group in config.stage.trainable if group != "xattn" or config.arch.cross_every)
        table.add_row(stage.name, trains, f"{done:,} of {steps:,}", state, str(stage.folder))
    return table
