"""The words of a sweep: lists on the command line and in an experiment file, its folder, and the names of its runs.

An experiment file may have a key `sweep`, a mapping from keys to lists of values, for which all combinations are run:
the first key changes slowest. Values on the command line replace those of the file. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from nvlm.commands.compose import CONF, unknown_value
from nvlm.commands.words import SWEEP_FLAGS, parse, plain_words, quoted
from nvlm.config.values import problem
from nvlm.runs.ownership import typed
from nvlm.runs.place import sweep_folder

_JOBS = "jobs"


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep was asked for. `words`: all of them, with the file's; `keys`: those that runs are named after;
    `jobs`: how many runs to do side by side (None: as many as fit)."""

    words: tuple[str, ...]
    folder: Path
    keys: frozenset[str]
    jobs: int | None

    def name(self, overrides: Sequence[str]) -> str:
        """The name of the folder of the run with these words, by the rule that Hydra is given in `for_hydra`."""
        return sweep_folder(",".join(sorted(word for word in overrides if _key(word) in self.keys)))

    def for_hydra(self) -> list[str]:
        """The words with which Hydra puts the runs into the same folders."""
        keys = sorted({parse(word).key_or_group for word in self.words if "=" in word and _key(word) not in self.keys})
        exclude = ",".join(map(quoted, keys))
        own = [f"hydra.sweep.dir={quoted(str(self.folder))}"]
        return [*self.words, *own, f"hydra.job.config.override_dirname.exclude_keys=[{exclude}]"]


def swept(words: Sequence[str]) -> Swept | None:
    """The sweep that `words` (as of `plain_words`) ask for; None for a single run. Raises ConfigError."""
    experiment = _experiment(words)
    listed = _listed(experiment)
    flags = [word for word in words if word.startswith("-")]
    if set(flags) - set(SWEEP_FLAGS):  # Hydra answers --help and the like
        return None
    if not flags:
        _check_single(words, experiment, listed)
        return None
    given = [word for word in words if not word.startswith("-") and _key(word) != _JOBS]
    named = {_key(word) for word in given}
    lists = plain_words([*flags, *(f"{key}={values}" for key, values in listed.items() if key not in named)])
    resume = [] if "resume" in named else ["resume=auto"]
    several = {_key(word) for word in given if parse(word).is_sweep_override()}
    keys = frozenset(several | set(listed))
    elsewhere = "hydra/launcher" in named
    if not keys and not elsewhere:
        raise problem("-m", "no key with several values", "a sweep, as in seed=1,2,3", "add one, or leave -m out")
    return Swept((*lists, *given, *resume), _folder(given, experiment if listed else ""), keys, _jobs(words, elsewhere))


def _check_single(words: Sequence[str], experiment: str, listed: dict[str, str]) -> None:
    missing = [key for key in listed if key not in [_key(word) for word in words]]
    if missing:
        fix = f"python launch/train.py -m +experiment={experiment}"
        expected = f"-m, since it is a sweep, or one value of {', '.join(missing)}"
        raise problem(f"+experiment={experiment}", "a single run", expected, fix)
    if any(_key(word) == _JOBS for word in words):
        raise problem(_JOBS, "no sweep", "-m, since it says how many runs go side by side", "add -m, or leave it out")


def _experiment(words: Sequence[str]) -> str:
    """The name of the experiment; empty if there is none, or several to sweep over, none of which may sweep itself."""
    named = [word for word in words if word.startswith("+experiment=")]
    if not named:
        return ""
    chosen = parse(named[-1])
    if not chosen.is_sweep_override():
        return _known(str(chosen.value()))
    if sweeps := [name for name in chosen.sweep_string_iterator() if _listed(str(name))]:
        raise problem(named[-1], f"the sweep {sweeps[0]} in a sweep", "one sweep at a time", f"+experiment={sweeps[0]}")
    return ""


def _known(experiment: str) -> str:
    """`experiment`, of which there must be a file: otherwise its lists would be missing without a word."""
    if not (CONF / "experiment" / f"{experiment}.yaml").is_file():
        raise unknown_value("experiment", experiment)
    return experiment


def _listed(experiment: str) -> dict[str, str]:
    """The sweep in the file of `experiment`: comma lists by key."""
    file = CONF / "experiment" / f"{experiment}.yaml"
    values = OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file.is_file() else {}
    if not isinstance(values, dict) or "sweep" not in values:
        return {}
    sweep, what, form = values["sweep"], f"sweep in {file}", "a list of values for each key"
    if not isinstance(sweep, dict) or not sweep:
        raise problem(what, "nothing" if not sweep else repr(sweep), form, "sweep: {seed: [1, 2, 3]}")
    for key, choices in sweep.items():
        if not isinstance(choices, list) or not choices or any(isinstance(one, dict | list) for one in choices):
            got = "no values" if not choices else repr(choices)
            raise problem(f"{what}: {key}", got, form, f"{key}: [..., ...]")
    return {str(key): ",".join(str(typed(one)) for one in choices) for key, choices in sweep.items()}


def _folder(given: Sequence[str], experiment: str) -> Path:
    """hydra.sweep.dir, else runs/sweep/ and the sweep's name: its `name`, its experiment, or all that was asked for."""
    values = {_key(word): parse(word) for word in given}
    if "hydra.sweep.subdir" in values:
        expected, fix = "no such key: runs are named after the keys that vary", "leave it out"
        raise problem("hydra.sweep.subdir", str(values["hydra.sweep.subdir"].value()), expected, fix)
    if "hydra.sweep.dir" in values:
        return Path(str(values["hydra.sweep.dir"].value()))
    if "name" in values and not values["name"].is_sweep_override():
        return Path("runs/sweep") / sweep_folder(str(values["name"].value()))
    ours = sorted(word for word in given if _key(word) != "resume" and not word.startswith("hydra"))
    return Path("runs/sweep") / (experiment or sweep_folder(",".join(ours)))


def _jobs(words: Sequence[str], elsewhere: bool) -> int | None:
    chosen = [parse(word).value() for word in words if _key(word) == _JOBS]
    if chosen and elsewhere:
        fix = "hydra.launcher.array_parallelism=N limits jobs in a cluster"
        raise problem(_JOBS, "a sweep on other machines", "one on this machine", fix)
    if chosen and (not isinstance(chosen[-1], int) or isinstance(chosen[-1], bool)):
        raise problem(_JOBS, repr(chosen[-1]), "a number of runs side by side", "jobs=2")
    return chosen[-1] if chosen else None


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")
