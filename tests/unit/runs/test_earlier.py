"""Run folders of earlier versions."""

from __future__ import annotations

import copy

import pytest
from omegaconf import OmegaConf

from nvlm.config.mapping import to_mapping
from nvlm.config.values import ConfigError
from nvlm.runs.earlier import as_written_now
from nvlm.runs.folder import read_run_config
from nvlm.runs.ownership import check_folder

BY_ARCH = {"decoder": 512, "xattn": 512, "hybrid": 512}


def without_logging(values: dict) -> None:
    del values["logging"]


def with_lengths_of_the_language_model(values: dict) -> None:
    values["llm"] |= {"seq_length": BY_ARCH, "cross_length": BY_ARCH, "steps": BY_ARCH}


def without_an_encoder_s_name(values: dict) -> None:
    del values["vision"]["encoder"]


def with_the_keys_of_all_sources(values: dict) -> None:
    keys = {"path": None, "heldout_path": None, "records": 1, "heldout_records": 1, "questions": 1}
    values["data"] = keys | values["data"]


def without_an_image_folder(values: dict) -> None:
    values["data"].pop("root", None)


def without_a_chat_format(values: dict) -> None:
    del values["llm"]["chat"]


def without_tasks_of_an_evaluation(values: dict) -> None:
    for key in ("every", "best", "tasks", "path", "shots", "metric", "tokens"):
        del values["evaluate"][key]


def without_userbuffers(values: dict) -> None:
    del values["parallel"]["userbuffers"]


def without_what_pages_are_about(values: dict) -> None:
    values["data"].pop("about", None)


def without_a_precision_of_gradients(values: dict) -> None:
    del values["parallel"]["gradients"]


def without_what_other_systems_have(values: dict) -> None:
    for group in ("video", "projector"):
        del values[group]
    later = {
        "tiling": ("kind", "pinpoints", "newline", "cap", "base", "fill", "several", "unpad"),
        "arch": ("sees",),
        "llm": ("qk_norm", "rope_interpolation"),
        "vision": ("pads", "pool", "order"),
        "stage": ("train_vision", "recipe", "parent"),
        "optim": ("lr_of",),
        "data": ("image_marks",),
    }
    for group, keys in later.items():
        for key in keys:
            del values[group][key]


def with_bound_tags_as_a_switch(values: dict) -> None:
    values["arch"]["bind_tags"] = False


EARLIER = (
    without_logging,
    without_an_image_folder,
    without_an_encoder_s_name,
    without_a_chat_format,
    with_lengths_of_the_language_model,
    with_the_keys_of_all_sources,
    without_tasks_of_an_evaluation,
    without_what_pages_are_about,
    without_userbuffers,
    without_a_precision_of_gradients,
    without_what_other_systems_have,
    with_bound_tags_as_a_switch,
)


def write(run_dir, values: dict):
    """A run's folder with one checkpoint and this config.yaml; returns the checkpoint's folder."""
    step = run_dir / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text(step.name)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return step


@pytest.mark.parametrize("source", [("data=pages",), ("data=jsonl", "data.path=r.jsonl")], ids=["pages", "jsonl"])
@pytest.mark.parametrize("change", EARLIER)
def test_what_an_earlier_version_wrote_is_read_and_resumed(tmp_path, configured, change, source):
    config = configured("arch=decoder", "resume=auto", "train.steps=77", "data.seq_length=700", *source)
    values = to_mapping(config)
    change(values)
    step = write(tmp_path, values)
    assert read_run_config(step) == config
    check_folder(config, tmp_path)
    with pytest.raises(ConfigError, match=r"data.seq_length\b.*: got 512\b.*, expected 700"):
        check_folder(configured("arch=decoder", "resume=auto", "train.steps=77", *source), tmp_path)


def test_tags_that_an_earlier_version_bound_stay_bound_without_order(configured):
    config = configured("arch=hybrid", "arch.bind_tags=mean")
    values = to_mapping(config)
    values["arch"]["bind_tags"] = True
    assert as_written_now(values) == to_mapping(config)


def test_what_this_version_writes_stays_as_it_is(configured):
    values = to_mapping(configured())
    before = copy.deepcopy(values)
    assert as_written_now(values) == before == values


def test_a_key_that_no_version_wrote_is_refused_with_the_file_s_name(tmp_path, configured):
    values = to_mapping(configured())
    values["llm"]["layerz"] = 3
    step = write(tmp_path, values)
    with pytest.raises(ConfigError, match=r"config.yaml: llm.layerz: got a key that does not exist, .*layers"):
        read_run_config(step)
