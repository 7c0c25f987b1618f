"""Command-line words as validated configurations. Imports no torch, so that mistakes are reported immediately."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nvlm.arch.registry import check_architecture, description
from nvlm.commands.blends import sources_by_name, with_sources
from nvlm.commands.words import SWEEP_FLAGS, parse, plain_words
from nvlm.config.keys import near_keys
from nvlm.config.mapping import from_mapping
from nvlm.config.rules import validate
from nvlm.config.values import Config, ConfigError, problem
from nvlm.estimate.lengths import check_lengths
from nvlm.runs.ownership import ROOT, flat
from nvlm.runs.place import sweep_folder
from nvlm.vision.encoders.registry import check_encoder

CONF = ROOT / "conf"
_ADDED = ("experiment", "pipeline")  # groups that are not set by default
LISTING = "launch/train.py --cfg job lists all keys and their values"


def _by_arch(values: dict, *, _root_: DictConfig) -> object:
    """The entry of `values`, which has one per architecture, for the chosen architecture."""
    name = _root_.arch.name
    description(name)  # raises if there is no such architecture
    if name not in values:
        raise problem("lengths", f"none for arch={name}", f"a value for it in {CONF / 'lengths'}", "add it there")
    return values[name]


def _steps_of(share: float, *, _root_: DictConfig) -> int:
    """A share of the run's steps, rounded up as transformers does, and fewer than all."""
    steps = int(_root_.train.steps)
    return min(math.ceil(share * steps), steps - 1)


OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True)  # for conf/config.yaml
OmegaConf.register_new_resolver("by_arch", _by_arch, replace=True)  # for conf/lengths
OmegaConf.register_new_resolver("steps_of", _steps_of, replace=True)  # for conf/optim


def to_config(composed: DictConfig, rules: Callable[[Config], Config] = validate) -> Config:
    """Hydra's composed configuration as a value that is validated by `rules` across its fields."""
    values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    if names := values.get("stages"):
        raise problem("stages", ", ".join(names), "one of them, for this command", f"+experiment={names[-1]}")
    values.pop("sweep", None)  # of an experiment: nvlm.commands.swept has made words of it
    if "sources" in values["data"]:
        values["data"]["sources"] = sources_by_name(values["data"]["sources"])
    return check_lengths(check_encoder(check_architecture(rules(from_mapping(Config, values)))))


def compose_config(*overrides: str) -> Config:
    """The configuration in conf/ with `overrides`, validated."""
    return to_config(_compose(overrides))


def unlaid_config(*overrides: str) -> Config:
    """The configuration in conf/ with `overrides` but with an open layout: rules across fields are not applied yet."""
    try:
        return to_config(_compose(overrides), lambda config: config)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise explain(error, words=overrides) from None


def unchecked_values(*overrides: str) -> dict:
    """The values in conf/ with `overrides`, as nested mappings. Nothing is validated."""
    return OmegaConf.to_container(_compose(overrides), resolve=True)


def check_overrides(arguments: list[str], also: Sequence[str] = ()) -> list[Config]:
    """Compose and validate every run requested by `arguments`, before the first one starts. Raises ConfigError.

    `also`: additional keys of the command, as suggestions for a mistyped key. Returns an empty list if `arguments`
    contain a flag that Hydra handles itself, such as --help.
    """
    if any(word.startswith("-") and word not in SWEEP_FLAGS for word in arguments):
        return []
    configs = []
    for combination in runs(effective(arguments)):
        try:
            configs.append(compose_config(*combination))
        except ConfigError:
            raise
        except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
            raise explain(error, also, combination) from None
    return configs


def effective(arguments: Sequence[str]) -> list[str]:
    """`arguments` as Hydra understands them: without keys that belong only to other data sources than the chosen one,
    of which it warns on stderr, and with every key of a blend's sources settable."""
    return with_sources(_of_source(arguments), sorted((CONF / "data").glob("*.yaml")))


def _of_source(arguments: Sequence[str]) -> list[str]:
    chosen = [word for word in arguments if word.startswith("data=")]
    file = CONF / "data" / f"{chosen[-1].partition('=')[2]}.yaml" if chosen else None
    if file is None or not file.is_file():
        return list(arguments)
    foreign = {f"data.{key}" for other in file.parent.glob("*.yaml") for key in _keys(other)}
    foreign -= {f"data.{key}" for key in _keys(file)}
    for word in (found := [word for word in arguments if word.partition("=")[0] in foreign]):
        print(f"{word}: ignored, {chosen[-1]} does not have it", file=sys.stderr)
    return [word for word in arguments if word not in found]


def _keys(file: Path) -> set[str]:
    """The keys of a file in conf/data, with those of the files that it begins with."""
    values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    bases = [base for base in values.pop("defaults", ()) if base != "_self_"]
    return set(values).union(*(_keys(file.parent / f"{base.partition('@')[0]}.yaml") for base in bases))


def runs(arguments: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The overrides of each run requested by `arguments`."""
    overrides = [parse(word) for word in plain_words(arguments) if not word.startswith("-")]
    for override in overrides:
        _check_group(override)
    return itertools.product(*map(_choices, overrides))


def _choices(override: Override) -> list[str]:
    """`override` once for each of its values. Raises ConfigError if there are none, as in range(1,1)."""
    if not override.is_sweep_override():
        return [override.input_line]
    choices = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    if not choices:
        key = override.key_or_group
        raise problem(key, f"no values in {override.input_line!r}", "at least one", f"{key}=A,B")
    return choices


def _check_group(override: Override) -> None:
    """Check that a group is set to one of its files. Hydra's own error does not name the group."""
    group, got = override.key_or_group, override.value()
    if (CONF / group).is_dir() and not override.is_sweep_override() and not isinstance(got, str | list):
        raise unknown_value(group, str(got).lower() if got is not None else "null")


def unknown_value(group: str, got: str) -> ConfigError:
    """The error for a group that has no file `got`."""
    known = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    near = get_close_matches(got, known, n=1)
    key = f"+{group}" if group in _ADDED else group
    if group == "experiment" and (CONF / "pipeline" / f"{got}.yaml").is_file():
        return problem(
            group, repr(got), "one experiment: this is a pipeline of several", f"launch/stages.py +pipeline={got}"
        )
    return problem(group, repr(got), f"one of {', '.join(known)}", f"{key}={near[0] if near else known[0]}")


def _compose(overrides=()) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def explain(error: Exception, also: Sequence[str] = (), words: Sequence[str] = ()) -> ConfigError:
    """An error of Hydra or OmegaConf about `words`, in this project's form."""
    text = str(error)
    if match := re.search(r"ConfigError raised while resolving interpolation: (.+)", text):
        return ConfigError(match[1])
    if match := re.search(r"Could not override '([^']+)'", text):
        chosen = (word.partition("=")[0] for word in words)
        groups = [word for word, key in zip(words, chosen, strict=True) if (CONF / key).is_dir() and key != match[1]]
        return unknown_key(match[1], also, groups)
    if match := re.search(r"Could not find '([^']+)/([^'/]*)'", text):
        return unknown_value(match[1], match[2])
    if "Could not load 'hydra/launcher/submitit" in text:
        what, expected = "hydra/launcher=slurm", "it, which sends the runs of a sweep to Slurm"
        return problem(what, "no hydra-submitit-launcher", expected, f"pip install -e '{ROOT}[slurm]'")
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return problem(match[1], "nothing", "a value", f"{match[1]}=...")
    return ConfigError(f"configuration: {_first_line(error)}. Fix: {LISTING}")


def unknown_key(key: str, also: Sequence[str] = (), choices: Sequence[str] = ()) -> ConfigError:
    """The error for a key that is neither in the configuration nor in `also`.

    `choices`: the command-line words that select the files of groups.
    """
    known = list(flat(OmegaConf.to_container(_compose(choices), resolve=False)))
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", *_ADDED))
    if others := [f"{group}={name}" for group, name in _files_with(key)]:
        section = key.partition(".")[0]
        expected = f"one of {', '.join(name for name in known if name.startswith(f'{section}.'))}"
        return problem(key, f"a key of {' and '.join(others)} alone", expected, f"{others[0]}, or leave it out")
    near = near_keys(key, [*also, *known, *groups, "+experiment"])
    sections = sorted({name.partition(".")[0] for name in known}.intersection(groups))
    expected = f"one of {', '.join(near)}" if near else f"one of the keys of {', '.join(sections)}"
    return problem(key, "a key that does not exist", expected, f"{near[0]}=..." if 0 < len(near) <= 3 else LISTING)


def _files_with(key: str) -> list[tuple[str, str]]:
    """(group, name) of the files in the key's group that contain the key."""
    group, _, leaf = key.partition(".")
    files = sorted((CONF / group).glob("*.yaml"))
    return [(group, file.stem) for file in files if leaf in OmegaConf.load(file) and leaf != "defaults"]
