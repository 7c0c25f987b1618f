"""Where the frozen encoder's published weights are, checked before anything is read. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from nvlm.config.values import Config, VisionConfig, problem
from nvlm.runs.folder import FROZEN, find_checkpoint, read_run_config, weight_keys
from nvlm.runs.record import read
from nvlm.runs.tensors import tensor_names
from nvlm.vision.encoders.registry import description_of
from nvlm.weights.parts import below
from nvlm.weights.published import RELEASE_CODE, VISION, Source, check_tensors, read_config, read_headers

ENCODER_WEIGHTS = "vision."  # what the names of its parameters would begin with in a checkpoint


def vision_source(config: Config, key: str = "init.vision") -> Source:
    """The published folder that holds the frozen encoder, checked; ConfigError where it is not what it should be.

    init.vision or init.release names it, else the run of init.checkpoint knows where it is. `key`: what init.vision is
    called on this command line.
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
    """Where the encoder is that the model in the step folder `step` was trained with, by its run's own record.

    Export, generation, evaluation and the next stage all find it here. A trained encoder would be in the checkpoint
    itself; until that can be read, ConfigError. So it is where nothing is left at the recorded place; `key`: the
    setting that would name another.
    """
    check_frozen(step)
    run_dir, before = step.parent.parent, read_run_config(step)
    named = before.init.vision or before.init.release
    if (shipped := description_of(before.vision).shipped.get(named or "")) is not None:
        return str(shipped)  # the package may have moved since
    recorded = read(run_dir).get("encoder")
    places = [place for place in (recorded and recorded.path, named) if place]
    for place in places:
        if Path(place).exists():
            return place
    got = f"nothing at {places[0]}" if places else "no record of it"
    raise problem(f"encoder of {run_dir}", got, "the encoder that it was trained with", f"{key}=DIR, where it is now")


def check_frozen(step: Path) -> None:
    """Raise ConfigError where the checkpoint holds weights of the encoder: it was trained, and its original files are
    not what the model sees with."""
    keys = [*tensor_names(step), *tensor_names(step.parent / FROZEN)]
    if learned := [name for name in weight_keys(keys) if name.startswith(ENCODER_WEIGHTS)]:
        got = f"a trained encoder ({len(learned)} tensors, {learned[0]} the first)"
        expected = "an encoder that stayed frozen: a trained one cannot be read from a checkpoint yet"
        raise problem(f"checkpoint {step}", got, expected, "take a checkpoint of a run whose encoder was frozen")


def _read(vision: VisionConfig, folder: str, key: str) -> Source:
    encoder = description_of(vision)
    stored = read_headers(folder, key)
    values = read_config(folder, key, (*encoder.code, *RELEASE_CODE)) or {}
    inside = any(name.startswith(VISION) for name in stored)  # a whole model's folder
    if inside:
        stored = {name: one for name, one in stored.items() if name.startswith(VISION)}
    prefix = VISION if inside else ""
    if values:
        encoder.check_config(values.get("vision_config") or values, vision, key)
    parts = below(prefix, encoder.parts(vision, {name.removeprefix(prefix): one for name, one in stored.items()}))
    spare = [name for name in stored if name.removeprefix(prefix).startswith(tuple(encoder.unused))]
    check_tensors(parts, stored, key, spare)
    return Source(key, folder, {"vision": parts}, stored)
