"""Where the encoder is read from: the folder that is named, else the one its run recorded, never silently another."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint

from nvlm.config.mapping import to_mapping
from nvlm.config.values import Config, ConfigError
from nvlm.export.export import export
from nvlm.export.options import parse
from nvlm.generate.config import read_config
from nvlm.inputs import identity
from nvlm.inputs.check import check_weights
from nvlm.runs.digests import write_manifest
from nvlm.runs.record import read, write
from nvlm.runs.tensors import tensor_names
from nvlm.vision.encoders.internvit.description import TINY
from nvlm.vision.source import encoder_of_run, trained_before, vision_source

MODEL = {"projector.norm.weight": torch.ones(4), "decoder.final_layernorm.weight": torch.ones(4)}
ENCODER = {"vision.decoder.layers.0.mlp.linear_fc1.weight": torch.ones(4, 2), "vision.class_embedding": torch.ones(1)}


def write_run(run: Path, config: Config, tensors: dict, frozen: dict | None = None) -> Path:
    """A run's folder with its configuration, the record of its encoder and one checkpoint; returns the latter."""
    step = run / "checkpoints" / "step_00000002"
    step.parent.mkdir(parents=True)
    (step.parent / "latest").write_text(step.name)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_mapping(config))))
    write(run, {"encoder": identity.of_encoder(config)})
    for folder, held in ((step, tensors), (step.parent / "frozen", frozen)):
        if held:
            checkpoint.save(held, checkpoint_id=folder, no_dist=True)
            write_manifest(folder, {}, None)
    return step


@pytest.fixture
def encoder(tmp_path) -> Path:
    copy = tmp_path / "encoder.safetensors"
    copy.write_bytes(TINY.read_bytes())
    return copy


@pytest.fixture
def config(configured, encoder) -> Config:
    return configured("arch=decoder", f"init.vision={encoder}")


def test_the_run_s_record_says_where_the_encoder_is(tmp_path, config, encoder, configured):
    step = write_run(tmp_path / "run", config, MODEL)
    elsewhere = encoder.rename(tmp_path / "elsewhere.safetensors")
    recorded = read(tmp_path / "run")["encoder"]
    write(tmp_path / "run", {"encoder": dataclasses.replace(recorded, path=str(elsewhere))})
    encoder.write_bytes(b"another file under the name in config.yaml")
    assert encoder_of_run(step) == str(elsewhere)
    later = configured("arch=decoder", "init.vision=null", f"init.checkpoint={tmp_path / 'run'}")
    assert vision_source(later).folder == str(elsewhere)
    identity.check_model(later, step)
    named = configured("arch=decoder", f"init.vision={TINY}", f"init.checkpoint={tmp_path / 'run'}")
    assert vision_source(named).folder == str(TINY)
    identity.check_model(named, step)


def test_an_encoder_that_ships_with_the_package_is_found_by_its_name(tmp_path, configured):
    step = write_run(tmp_path / "run", configured("arch=decoder"), MODEL)
    write(tmp_path / "run", {"encoder": identity.Identity("/another/machine/tiny_encoder.safetensors", 1, "0")})
    assert encoder_of_run(step) == str(TINY)


def test_a_run_without_a_record_goes_by_its_configuration(tmp_path, config, encoder):
    step = write_run(tmp_path / "run", config, MODEL)
    (tmp_path / "run" / "inputs.json").unlink()
    assert encoder_of_run(step) == str(encoder)


def test_an_encoder_that_is_gone_is_said_with_a_fix(tmp_path, config, encoder):
    run = tmp_path / "run"
    write_run(run, config, MODEL)
    moved = encoder.rename(tmp_path / "moved.safetensors")
    with pytest.raises(ConfigError, match=rf"encoder of {run}: got nothing at {encoder}.*Fix: init.vision=DIR"):
        read_config(run)
    with pytest.raises(ConfigError, match=rf"encoder of {run}: got nothing at {encoder}.*Fix: vision=DIR"):
        export(parse([f"checkpoint={run}", f"out={tmp_path / 'out'}"]))
    assert vision_source(read_config(run, [f"init.vision={moved}"])).folder == str(moved)


@pytest.mark.parametrize("where", ["the step", "a file of the run"])
def test_a_trained_encoder_is_where_it_was_saved_and_the_original_is_not_needed(
    tmp_path, config, encoder, configured, where
):
    run = tmp_path / "run"
    step = write_run(run, config, MODEL | ENCODER if where == "the step" else MODEL)
    place = step
    if where != "the step":
        place = run / "encoder.safetensors"
        place.write_bytes(TINY.read_bytes())
    encoder.unlink()
    after = ("arch=decoder", f"init.checkpoint={run}")
    later = configured(*after, "init.vision=null")
    assert encoder_of_run(step) == str(place) and trained_before(later) == place
    check_weights(later)
    check_weights(dataclasses.replace(config, init=later.init, resume="auto"), run)
    assert identity.of_encoder(later) == read(run)["encoder"]  # what it began as
    assert read_config(run).init.vision is None
    # The original may be named, but no other one.
    encoder.write_bytes(TINY.read_bytes())
    check_weights(configured(*after, f"init.vision={encoder}"))
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(TINY).items()}, other)
    with pytest.raises(ConfigError, match=f"init.vision: got {other}.*the encoder that {run} was trained with"):
        check_weights(configured(*after, f"init.vision={other}"))


def test_a_run_s_file_of_a_trained_encoder_is_not_replaced_unnoticed(tmp_path, config, configured):
    run = tmp_path / "run"
    step, file = write_run(run, config, MODEL), run / "encoder.safetensors"
    file.write_bytes(TINY.read_bytes())
    write(run, read(run) | {"own encoder": identity.of_own_encoder(run)})
    later = configured("arch=decoder", f"init.checkpoint={run}", "init.vision=null")
    identity.check_model(later, step)
    save_file({name: tensor + 1 for name, tensor in load_file(TINY).items()}, file)
    with pytest.raises(ConfigError, match=f"{file}: got .*expected what the run wrote"):
        identity.check_model(later, step)


def test_names_are_read_without_running_what_a_pickle_names(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Runs()}))
    with pytest.raises(ConfigError, match="a damaged .metadata"):
        tensor_names(tmp_path)
    assert not (tmp_path / "ran").exists()
