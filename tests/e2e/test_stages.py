"""Stages in one command: each in its own folder, ended by a signal, resumed where they ended."""

from __future__ import annotations

import json
import os
import signal

import pytest

from nvlm.runs.folder import read_run_config, steps_done
from tests.e2e.preloaded import at, run, start, wait_for

FEW = [
    "+pipeline=tiny_two_stage", "precision=fp32", "train.threads=1", "train.global_batch=4", "train.steps=4",
    "optim.warmup=1", "evaluate.losses=6", "evaluate.questions=0", "llm.layers=2", "llm.cross_every=1",
    "stages.tiny_pretrain.train.steps=30",
]  # fmt: skip
FEW += [
    f"stages.tiny_{stage}.data.sources.{name}.{key}"
    for stage, name in (("text", "text"), ("pretrain", "pages"), ("sft", "text"), ("sft", "pages"))
    for key in ("records=24", "heldout_records=8")
]


def losses(folder) -> dict[int, dict[str, float]]:
    rows = json.loads((folder / "losses.json").read_text())
    return {int(step): {name: one["loss"] for name, one in row.items()} for step, row in rows.items()}


@pytest.mark.slow
def test_stages_follow_each_other_and_go_on_after_a_signal(tmp_path):
    text, pretrain, sft = (tmp_path / "runs" / "mine" / name for name in ("tiny_text", "tiny_pretrain", "tiny_sft"))
    process = start(tmp_path, *FEW, "name=mine")
    wait_for(lambda: (pretrain / "config.yaml").is_file() and (found := at(tmp_path, 0)) and found.step >= 1)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 0 and "stopped by SIGTERM" in output, output
    assert steps_done(text) == 4 and 0 < steps_done(pretrain) < 30 and not sft.exists()

    status, output = run(tmp_path, *FEW, "name=mine")
    assert status == 2 and "run folder runs/mine/tiny_text: got a folder that holds a run" in output, output
    status, output = run(tmp_path, *FEW, "name=mine", "resume=auto")
    assert status == 0 and "stage 1 of 3" not in output, output
    assert "stage 2 of 3: tiny_pretrain, in runs/mine/tiny_pretrain\nresuming from step " in output
    assert "stage 3 of 3: tiny_sft" in output and "│ projector " in output
    assert [steps_done(folder) for folder in (text, pretrain, sft)] == [4, 30, 4]
    config = read_run_config(sft / "checkpoints" / "step_00000004")
    assert (config.name, config.init.checkpoint) == ("mine-tiny_sft", "runs/mine/tiny_pretrain")
    # The language model is frozen in the second stage, so its loss on text is what the first stage left.
    first, last = losses(text), losses(sft)
    assert first[0]["text"] > first[4]["text"] == last[0]["text"] and last[4].keys() == {"pages", "text"}
    assert losses(pretrain)[30]["pages"] == last[0]["pages"]


@pytest.mark.slow
def test_a_signal_after_a_stage_s_last_step_ends_the_sequence(tmp_path):
    """All steps of the first stage are done, but not its evaluation: the second one must not begin."""
    words = ["evaluate.questions=60" if word == "evaluate.questions=0" else word for word in FEW]
    process = start(tmp_path, *words, "evaluate.batch=2", "name=mine")
    wait_for(lambda: (found := at(tmp_path, 0)) and found.phase == "evaluate" and found.step >= 4)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 0 and "stopped by SIGTERM after step 4" in output, output
    assert steps_done(tmp_path / "runs" / "mine" / "tiny_text") == 4 and "stage 2 of 3" not in output
