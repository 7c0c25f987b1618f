"""The configuration of a trained run, adapted for generation. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nvlm.arch.registry import check_architecture
from nvlm.config.compute import PrecisionConfig
from nvlm.config.keys import near_keys
from nvlm.config.mapping import from_mapping, to_mapping
from nvlm.config.rules import validate
from nvlm.config.values import Config, ConfigError, problem
from nvlm.estimate.lengths import check_lengths
from nvlm.inputs.check import check_weights
from nvlm.runs.folder import find_checkpoint, read_run_config
from nvlm.runs.ownership import flat
from nvlm.vision.encoders.registry import check_encoder

_ONE_PROCESS = {
    "tensor": 1,
    "pipeline": 1,
    "virtual": 1,
    "context": 1,
    "context_heads": 1,
    "sequence": False,
    "userbuffers": False,
    "data": 1,
    "distributed_optimizer": False,
    "gradients": "fp32",
}


def read_config(checkpoint: str | Path, overrides: Sequence[str] = (), also: Sequence[str] = ()) -> Config:
    """The configuration for generating with the weights in a run folder or in one of its step folders.

    The layout is one process unless `overrides` ("key=value" for the configuration) change it. `also`: other keys that
    a mistyped one may have meant. Raises ConfigError.
    """
    return for_generation(config_of(checkpoint, overrides, also))


def config_of(
    checkpoint: str | Path,
    overrides: Sequence[str] = (),
    also: Sequence[str] = (),
    instead: Mapping[str, dict[str, Any]] | None = None,
) -> Config:
    """As `read_config`, in any layout, and without a look at the weights. `instead`: groups of keys in place of the
    run's own."""
    folder = find_checkpoint(Path(checkpoint).resolve(), "checkpoint")
    before = read_run_config(folder)
    values = to_mapping(before) | dict(instead or {})
    values["parallel"] |= _ONE_PROCESS
    values["init"] = {"llm": None, "release": None, "vision": None, "checkpoint": str(folder)}
    values["peft"]["targets"] = before.adapted or before.peft.targets  # groups that were new had no adapters
    values["stage"]["new"] = []
    values["train"] |= {"offload": False, "recompute": "none"}  # nothing is kept for a backward pass
    # FP8 kernels need certain multiples of tokens, so products and weights are in bf16.
    plain = {"edges": 0, "encoder": False, "param_gather": False}
    values["precision"] = plain | {"name": PrecisionConfig(**plain | values["precision"]).dtype}
    known = flat(values)
    changes = [re.sub("^precision=", "precision.name=", word) for word in overrides]  # as in training
    for word in changes:
        key = word.partition("=")[0]
        if key not in known:
            near = near_keys(key, [*also, *known])
            expected = f"one of {', '.join(near)}" if near else "a key of the run's config.yaml"
            raise problem(key, "a key that does not exist", expected, f"{near[0]}=..." if near else "leave it out")
    try:
        changed = OmegaConf.to_container(OmegaConf.merge(values, OmegaConf.from_dotlist(changes)))
    except (OmegaConfBaseException, ValueError, YAMLError) as error:
        raise ConfigError(f"command line: {str(error).splitlines()[0]}. Fix: write key=value") from None
    return check_lengths(check_encoder(check_architecture(validate(from_mapping(Config, changed)))))


def for_generation(config: Config) -> Config:
    """Return `config`, or raise ConfigError if its layout cannot generate text or its weights are missing."""
    for key in ("context", "data", "userbuffers"):
        got, needed = getattr(config.parallel, key), _ONE_PROCESS[key]
        if got != needed:
            what = str(needed).lower()
            raise problem(f"parallel.{key}", got, f"{what} to generate text", f"parallel.{key}={what}")
    check_weights(config)
    return config
