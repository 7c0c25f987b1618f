"""Real processes: train, kill, resume, sweep, dry run, and the answers to wrong commands."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvlm.commands.launch import check_devices
from nvlm.config.values import ConfigError
from nvlm.data.loader import Steps
from tests.e2e import preloaded
from tests.e2e.faults import replace_steps
from tests.e2e.runs import SMALL, command, losses, rows, train

ROOT = Path(__file__).resolve().parents[2]


def train_by_command(where: Path, *overrides) -> None:
    """The same with the command that a user types."""
    done = subprocess.run(command(*overrides), cwd=where, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    where = tmp_path_factory.mktemp("unbroken")
    train_by_command(where, "name=whole")
    return where / "runs" / "whole"


def test_a_run_leaves_its_whole_story(unbroken):
    assert [row["step"] for row in rows(unbroken)] == [1, 2, 3, 4, 5, 6]
    assert losses(unbroken)[-1] < losses(unbroken)[0]
    names = {path.name for path in unbroken.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints"} <= names
    environment = json.loads((unbroken / "environment.json").read_text())
    assert environment["packages"]["megatron-core"]
    assert (unbroken / "checkpoints" / "latest").read_text() == "step_00000006\n"
    assert list((unbroken / "tensorboard").iterdir())


class Stalled(Steps):
    """Its fifth step never comes."""

    def __getitem__(self, step):
        if step == 4:
            time.sleep(600)
        return super().__getitem__(step)


def stall() -> None:
    replace_steps(Stalled)


def test_killed_and_resumed_equals_unbroken_exactly(unbroken, tmp_path):
    run = tmp_path / "runs" / "killed"
    process = preloaded.start(tmp_path, *SMALL, "name=killed", "train.async_save=false", change=stall)
    try:
        preloaded.wait_for(lambda: (now := preloaded.at(tmp_path, 0)) and now.step == 5)
        preloaded.wait_for(lambda: (run / "checkpoints" / "latest").is_file())
    finally:
        for pid in preloaded.alive(tmp_path):
            os.kill(pid, signal.SIGKILL)
        process.join(20)
    assert (run / "checkpoints" / "latest").read_text() == "step_00000003\n"
    done = train(tmp_path, "name=killed", check=False)
    assert done.returncode == 2
    assert "resume=auto" in done.stderr
    train(tmp_path, "name=killed", "resume=auto")
    assert losses(run) == losses(unbroken)


def test_a_half_written_checkpoint_is_not_taken_for_one(unbroken, tmp_path):
    """What a kill during a save leaves: a folder with another name, and the old `latest`."""

    run = tmp_path / "runs" / "whole"
    shutil.copytree(unbroken, run)
    checkpoints = run / "checkpoints"
    (checkpoints / "step_00000006").rename(checkpoints / ".step_00000006.partial")
    (checkpoints / ".step_00000006.partial" / "metadata.json").unlink()
    (checkpoints / "latest").write_text("step_00000003\n")
    train(tmp_path, "name=whole", "resume=auto")
    assert losses(run) == losses(unbroken)
    assert (checkpoints / "latest").read_text() == "step_00000006\n"
    assert not list(checkpoints.glob(".*partial"))


LAYOUTS = [
    "parallel.data=2",
    "parallel.data=2 parallel.distributed_optimizer=true",
    "parallel.tensor=2",
    "parallel.tensor=2 parallel.sequence=true",
    "parallel.pipeline=2 train.micro_batch=1",
    "parallel.pipeline=2 parallel.virtual=2 train.micro_batch=1",
    "parallel.context=2",
    "parallel.data=2 vision.balance=global",
]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A function from a layout to the folder in which two processes trained the run `two`."""

    @functools.cache
    def of(layout: str) -> Path:
        where = tmp_path_factory.mktemp("two")
        train(where, "name=two", *layout.split())
        return where

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_give_the_losses_of_one(unbroken, two, layout):
    assert losses(two(layout) / "runs" / "two") == pytest.approx(losses(unbroken), rel=1e-4)


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3]])
def test_two_processes_resume_exactly(two, layout):
    where = two(layout)
    run = where / "runs" / "two"
    whole = losses(run)
    (run / "checkpoints" / "latest").write_text("step_00000003\n")
    train(where, "name=two", "resume=auto", *layout.split())
    assert losses(run) == whole


@pytest.mark.slow  # torch is imported four times
def test_torchrun_s_workers_are_used(unbroken, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, *command("name=t")[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "runs" / "t") == pytest.approx(losses(unbroken), rel=1e-4)


def test_pretraining_moves_the_new_modules_alone(tmp_path):
    done = train(tmp_path, "name=p", "stage=pretrain", "arch=xattn", "precision=bf16")
    table = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("│")}
    assert "frozen" in table["llm"]
    assert "frozen" in table["vision"]
    assert "yes" in table["projector"]
    assert "yes" in table["xattn"]


def test_too_many_bad_records_stop_the_run_and_are_named(tmp_path):
    good = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    bad = good | {"images": ["gone.png"]}
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [good, bad, bad, bad]))
    done = train(tmp_path, "name=bad", "data=jsonl", "data.path=r.jsonl", "data.max_skipped=0.005", check=False)
    assert done.returncode == 2
    assert "bad records" in done.stderr
    skipped = [json.loads(line) for line in (tmp_path / "runs" / "bad" / "skipped.jsonl").read_text().splitlines()]
    assert {row["record"] for row in skipped} == {"r.jsonl:2", "r.jsonl:3", "r.jsonl:4"}
    assert all("no such image" in row["reason"] for row in skipped)


def test_the_real_model_without_gpus_names_what_it_needs(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), "arch=hybrid", "llm=qwen2-72b"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "expected 128 GPUs" in done.stderr
    assert "with parallel.pipeline=2 32 GPUs" in done.stderr
    assert "dry_run=true" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_too_few_shards_for_the_real_model_are_said(configured):
    with pytest.raises(ConfigError, match="with parallel.pipeline=") as caught:
        check_devices(configured("llm=qwen2-72b", "parallel.tensor=2", "parallel.pipeline=1"))
    assert "more shards of the model" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        check_devices(configured("llm=qwen2-72b", "parallel.tensor=1", "parallel.sequence=false"))
    said = str(caught.value)
    assert "more shards" in said and "with parallel.pipeline=" not in said  # eight stages are too few


def test_dry_run_prints_exact_counts_in_little_time_and_memory(tmp_path):
    script = (
        "import resource, subprocess, sys\n"
        f"out = subprocess.run([sys.executable, {str(ROOT / 'launch' / 'train.py')!r}, 'arch=decoder', 'llm=qwen2-72b',"
        " 'dry_run=true'], capture_output=True, text=True)\n"
        "print(out.stdout, out.stderr, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    began = time.monotonic()
    text = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True).stdout
    assert time.monotonic() - began < 60
    assert int(text.split()[-1]) < 4 * 2**20  # KiB
    for number in ("72,706,203,648", "5,536,496,000", "78,863,416,704", "1,827"):
        assert number in text, text


def test_resume_refuses_another_configuration(unbroken):
    done = train(unbroken.parents[1], "name=whole", "resume=auto", "optim.lr=4e-3", check=False)
    assert done.returncode == 2
    assert "optim.lr" in done.stderr
    assert "as at the start of the run" in done.stderr


def test_own_records_train_without_heldout_ones(tmp_path):
    from PIL import Image

    Image.new("RGB", (300, 120), "white").save(tmp_path / "a.png")
    row = {
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Nothing."}],
        "images": ["a.png"],
    }
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    done = train(tmp_path, "name=own", "data=jsonl", "data.path=r.jsonl", "evaluate.questions=9", "arch=decoder")
    assert len(losses(tmp_path / "runs" / "own")) == 6
    assert "heldout" not in done.stdout


def test_an_unreadable_heldout_record_counts_as_wrong(tmp_path):
    talk = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(talk) + "\n")
    (tmp_path / "h.jsonl").write_text(json.dumps(talk) + "\n" + json.dumps(talk | {"images": ["gone.png"]}) + "\n")
    paths = ("data.path=r.jsonl", "data.heldout_path=h.jsonl")
    done = train(tmp_path, "name=own", "data=jsonl", *paths, "evaluate.questions=9", "evaluate.batch=1")
    assert done.stdout.splitlines()[-1].startswith("heldout exact_match=")
    score = json.loads(
        (tmp_path / "runs" / "own" / "evaluation" / "heldout" / "step_00000006" / "score.json").read_text()
    )
    assert score["count"] == 2
    assert score["by_category"]["unreadable"]["mean"] == 0
    assert score["mean"] <= 0.5
