"""Where the frozen encoder's published weights are, checked before anything is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvlm.config.values import Config, VisionConfig, problem
from nvlm.runs.folder import FROZEN, find_checkpoint, read_run_config, weight_keys
from nvlm.runs.record import read
from nvlm.runs.tensors import tensor_names
from nvlm.vision.encoders.registry import description_of
from nvlm.weights.layouts import LLAVA, Layout, encoder_prefix, opened
from nvlm.weights.parts import Part, below
from nvlm.weights.published import RELEASE_CODE, Source, Stored, check_tensors, read_config

ENCODER_WEIGHTS = "vision."  # prefix of its parameters' names in a checkpoint


def vision_source(config: Config, key: str = "init.vision") -> Source:
    """The published folder of the frozen encoder, checked. Raises ConfigError if it does not match `config`.

    init.vision or init.release names it, else the record of init.checkpoint's run. `key`: the name of init.vision on
    this command line.
    """
    init = config.init
    if init.vision:
        return _read(config.vision, str(description_of(config.vision).shipped.get(init.vision, init.vision)), key)
    if init.release:
        return _read(config.vision, init.release, "init.release")
    if init.checkpoint:
        place = encoder_of_run(find_checkpoint(Path(init.checkpoint), "init.checkpoint"), key)
        return _read(config.vision, place, "init.checkpoint")
    raise problem("init.vision", "nothing", "the frozen encoder's weights", "init.vision=DIR, or vision=tiny")


def encoder_of_run(step: Path, key: str = "init.vision") -> str:
    """The path of the encoder with which the model in the step folder `step` was trained, from the record of its run.

    Used by export, generation, evaluation and the next stage. Raises ConfigError if nothing is left at that path, or if
    the checkpoint holds a trained encoder, which cannot be read yet. `key`: the setting that names another path.
    """
    check_frozen(step)
    run_dir, before = step.parent.parent, read_run_config(step)
    named = before.init.vision or before.init.release
    if (shipped := description_of(before.vision).shipped.get(named or "")) is not None:
        return str(shipped)  # the package may have moved since then
    recorded = read(run_dir).get("encoder")
    places = [place for place in (recorded and recorded.path, named) if place]
    for place in places:
        if Path(place).exists():
            return place
    got = f"nothing at {places[0]}" if places else "no record of it"
    raise problem(f"encoder of {run_dir}", got, "the encoder that it was trained with", f"{key}=DIR, where it is now")


def check_frozen(step: Path) -> None:
    """Raise ConfigError if the checkpoint holds encoder weights: the encoder was trained, so its original files do not
    belong to the model."""
    keys = [*tensor_names(step), *tensor_names(step.parent / FROZEN)]
    if learned := [name for name in weight_keys(keys) if name.startswith(ENCODER_WEIGHTS)]:
        got = f"a trained encoder ({len(learned)} tensors, {learned[0]} the first)"
        expected = "an encoder that stayed frozen: a trained one cannot be read from a checkpoint yet"
        raise problem(f"checkpoint {step}", got, expected, "take a checkpoint of a run whose encoder was frozen")


def _read(vision: VisionConfig, folder: str, key: str) -> Source:
    encoder = description_of(vision)
    layout, stored = opened(folder, key)
    prefix = encoder_prefix(stored)
    stored = {name: one for name, one in stored.items() if name.startswith(prefix)}
    if values := _described(layout, folder, key, (*encoder.code, *RELEASE_CODE)):
        encoder.check_config(values, vision, key)
    found = encoder_parts(vision, stored, prefix)
    check_tensors(found.parts, stored, key, found.spare)
    return Source(key, folder, {"vision": found.parts}, stored, prefix)


@dataclass(frozen=True, slots=True)
class EncoderParts:
    """An encoder's tensors in a folder: those of the model, and those that may be there but are not used."""

    parts: Sequence[Part]
    spare: Sequence[str]


def encoder_parts(vision: VisionConfig, stored: Mapping[str, Stored], prefix: str) -> EncoderParts:
    """The encoder's tensors among `stored`, whose names begin with `prefix`."""
    encoder = description_of(vision)
    own = {name.removeprefix(prefix): one for name, one in stored.items() if name.startswith(prefix)}
    spare = [prefix + name for name in own if encoder.unneeded(vision, name)]
    return EncoderParts(below(prefix, encoder.parts(vision, own)), spare)


def _described(layout: Layout, folder: str, key: str, code: Sequence[str]) -> Mapping:
    """What a config.json says of the encoder; empty if nothing does."""
    if layout is LLAVA:  # its config.json describes the language model and only names the encoder
        return {}
    values = read_config(str(Path(folder) / layout.folders.get("vision", "")), key, code) or {}
    return values.get("vision_config") or values
