"""What a command asks for: its own keys, the configuration of the model, and where the weights are.

Imports no torch, so that a mistake is answered at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nvlm.cli import check_overrides, unknown_key
from nvlm.config import Config, ConfigError, DataConfig, PrecisionConfig, from_mapping, problem
from nvlm.fields import named
from nvlm.folder import flat
from nvlm.generate.sampling import Sampling
from nvlm.launch import check_weights
from nvlm.lengths import check_lengths
from nvlm.rules import validate
from nvlm.runs import find_checkpoint, read_run_config

HELP = """python launch/generate.py checkpoint=DIR [image=PATH] prompt="..." [key=value ...]

checkpoint=DIR      a run folder (its newest checkpoint), or one of its checkpoints/step_N
image=PATH          an image, or several: image=[a.png,b.png]; <image> in the prompt marks their places, else in front
prompt=TEXT         the user's first words; system=TEXT replaces the run's system message, system= leaves it out
max_new_tokens=256  temperature=0  top_p=1  seed=0      temperature 0 takes the likeliest token
chat=true           reads further turns from standard input, a line each; /image PATH adds an image to the next one
parallel.tensor=2 and other keys of the run's configuration change it; without a checkpoint it is composed from conf/"""

OPTIONS = ("checkpoint", "image", "prompt", "system", "max_new_tokens", "temperature", "top_p", "seed", "chat")
_ONE_PROCESS = {
    "tensor": 1,
    "pipeline": 1,
    "virtual": 1,
    "context": 1,
    "context_heads": 1,
    "sequence": False,
    "data": 1,
    "distributed_optimizer": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One conversation to hold, with the model of `config`, whose weights are what config.init names."""

    config: Config
    images: tuple[Path, ...]
    prompt: str | None
    sampling: Sampling
    chat: bool


def parse(arguments: Sequence[str]) -> Request:
    """A command line as a request. Raises ConfigError."""
    own, others = _split(arguments)
    chat = _number(own, "chat", {"true": True, "false": False}.__getitem__, False)
    sampling = Sampling(
        max_new_tokens=_number(own, "max_new_tokens", int, Sampling().max_new_tokens),
        temperature=_number(own, "temperature", float, Sampling().temperature),
        top_p=_number(own, "top_p", float, Sampling().top_p),
        seed=_number(own, "seed", int, Sampling().seed),
    )
    config = read_config(own["checkpoint"], others) if own.get("checkpoint") else _composed(others)
    if "system" in own:
        values = dataclasses.asdict(config.data) | {"system": own["system"] or None}
        config = dataclasses.replace(config, data=from_mapping(DataConfig, values, "data."))
    if not chat and not own.get("prompt"):
        raise problem("prompt", "nothing", "the user's words, or chat=true to read them", 'prompt="What is this?"')
    sampling.prompt_room(config.llm.max_positions)
    images = _images(own.get("image", ""))
    return Request(config=config, images=images, prompt=own.get("prompt"), sampling=sampling, chat=chat)


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The command's own keys, as they came, and the other words. Hydra would read a prompt's signs as grammar."""
    own, others = {}, []
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals:
            raise problem("command line", repr(word), "key=value", "--help lists the keys")
        if key in OPTIONS:
            own[key] = value
        else:
            others.append(word)
    return own, others


def _number(own: dict[str, str], key: str, kind, default):
    if key not in own:
        return default
    try:
        return kind(own[key])
    except (ValueError, KeyError):
        expected = {int: "a whole number", float: "a number"}.get(kind, "true or false")
        raise problem(key, repr(own[key]), expected, f"{key}={str(default).lower()}") from None


def _images(text: str) -> tuple[Path, ...]:
    listed = text[1:-1].split(",") if text.startswith("[") and text.endswith("]") else [text]
    paths = tuple(Path(name.strip()) for name in listed if name.strip())
    for path in paths:
        if not path.is_file():
            raise problem("image", named(path), "an image file", "image=PATH")
    return paths


def read_config(checkpoint: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run's folder or of one of its step folders, whose weights a model is to begin with.

    Its layout is one process unless `overrides` ("key=value" of the configuration) say otherwise. Raises ConfigError.
    """
    folder = find_checkpoint(Path(checkpoint).resolve(), "checkpoint")
    before = read_run_config(folder)
    values = dataclasses.asdict(before)
    values["parallel"] |= _ONE_PROCESS
    # The weights are all in the checkpoint, but for the encoder's, which never change.
    encoder = values["init"]["vision"] or values["init"]["release"]
    values["init"] = {"llm": None, "release": None, "vision": encoder, "checkpoint": str(folder)}
    values["peft"]["targets"] = before.adapted or before.peft.targets  # what was new had no adapters
    values["stage"]["new"] = []
    values["train"] |= {"offload": False, "recompute": "none"}  # nothing is kept for a backward pass
    # FP8 products take tokens by the dozen, and weights are kept in bf16.
    plain = {"edges": 0, "encoder": False, "param_gather": False}
    values["precision"] = plain | {"name": PrecisionConfig(**plain | values["precision"]).dtype}
    known = flat(values)
    changes = [re.sub("^precision=", "precision.name=", word) for word in overrides]  # as for a run it names all of it
    for word in changes:
        key = word.partition("=")[0]
        if key not in known:
            raise unknown_key(key, OPTIONS)
    try:
        changed = OmegaConf.to_container(OmegaConf.merge(values, OmegaConf.from_dotlist(changes)))
    except (OmegaConfBaseException, ValueError, YAMLError) as error:
        raise ConfigError(f"command line: {str(error).splitlines()[0]}. Fix: write key=value") from None
    return _checked(check_lengths(validate(from_mapping(Config, changed))))


def _composed(overrides: Sequence[str]) -> Config:
    configs = check_overrides(list(overrides), OPTIONS)
    if len(configs) != 1:
        raise problem("command line", f"{len(configs)} configurations", "one", "give each key one value")
    (config,) = configs
    if not (config.init.llm or config.init.release or config.init.checkpoint):
        fix = "checkpoint=runs/NAME, init.release=DIR or init.llm=DIR"
        raise problem("checkpoint", "nothing", "a run folder, or weights that config.init names", fix)
    return _checked(config)


def _checked(config: Config) -> Config:
    for key in ("context", "data"):
        got = getattr(config.parallel, key)
        if got != 1:
            raise problem(f"parallel.{key}", got, "1 to generate text", f"parallel.{key}=1")
    check_weights(config)
    return config
