"""Where the encoder's weights are: in a published folder, which is checked before anything is read, or, if it learned,
in a checkpoint or in a file of the run. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvlm.config.values import Config, VisionConfig, problem
from nvlm.runs.folder import ENCODER, find_checkpoint, read_run_config
from nvlm.runs.record import read
from nvlm.runs.tensors import tensor_names
from nvlm.vision.encoders.registry import description_of
from nvlm.weights.layouts import LLAVA, Layout, encoder_prefix, opened
from nvlm.weights.parts import Part, below
from nvlm.weights.published import RELEASE_CODE, Source, Stored, check_tensors, read_config

ENCODER_WEIGHTS = "vision."  # prefix of its parameters' names in a checkpoint


def vision_source(config: Config, key: str = "init.vision") -> Source:
    """The published folder of the encoder, checked. Raises ConfigError if it does not match `config`.

    init.vision or init.release names it, else the record of init.checkpoint's run. `key`: the name of init.vision on
    this command line.
    """
    init = config.init
    if init.vision:
        place = str(description_of(config.vision).shipped.get(init.vision, init.vision))
        return published_encoder(config.vision, place, key)
    if init.release:
        return published_encoder(config.vision, init.release, "init.release")
    if init.checkpoint:
        place = encoder_of_run(find_checkpoint(Path(init.checkpoint), "init.checkpoint"), key)
        return published_encoder(config.vision, place, "init.checkpoint")
    raise problem("init.vision", "nothing", "the encoder's weights", "init.vision=DIR, or vision=tiny")


def trained_encoder(step: Path) -> Path | None:
    """Where the encoder of the model in the step folder `step` is, if it learned: in the step folder itself or, if it
    learned in an earlier stage, in a file of the run."""
    if any(name.startswith(ENCODER_WEIGHTS) for name in tensor_names(step)):
        return step
    file = step.parent.parent / ENCODER
    return file if file.is_file() else None


def trained_before(config: Config) -> Path | None:
    """`trained_encoder` of init.checkpoint. The model goes on with it; init.vision may still name what it began as."""
    if not config.init.checkpoint:
        return None
    return trained_encoder(find_checkpoint(Path(config.init.checkpoint), "init.checkpoint"))


def encoder_of_run(step: Path, key: str = "init.vision") -> str:
    """The path of the encoder with which the model in the step folder `step` was trained: of a trained one, or from the
    record of its run.

    Used by export, generation, evaluation and the next stage. Raises ConfigError if nothing is left at that path.
    `key`: the setting that names another path.
    """
    if trained := trained_encoder(step):
        return str(trained)
    run_dir, places = step.parent.parent, _places(step)
    for place in places:
        if Path(place).exists():
            return place
    got = f"nothing at {places[0]}" if places else "no record of it"
    raise problem(f"encoder of {run_dir}", got, "the encoder that it was trained with", f"{key}=DIR, where it is now")


def began_as(vision: VisionConfig, step: Path) -> Source | None:
    """The published folder with which the encoder of the model in `step` began, if it learned and the folder is still
    there. Raises ConfigError if another one is."""
    places = [place for place in _places(step) if Path(place).exists()]
    return published_encoder(vision, places[0], "vision") if places and trained_encoder(step) else None


def _places(step: Path) -> list[str]:
    """Where the published encoder of the run of `step` was: as it ships with the package, as recorded, as named."""
    run_dir, before = step.parent.parent, read_run_config(step)
    named = before.init.vision or before.init.release
    if (shipped := description_of(before.vision).shipped.get(named or "")) is not None:
        return [str(shipped)]  # the package may have moved since then
    recorded = read(run_dir).get("encoder")
    return [place for place in (recorded and recorded.path, named) if place]


def published_encoder(vision: VisionConfig, folder: str, key: str) -> Source:
    """The encoder in a published folder or file, checked. `key`: the setting that names it."""
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
