"""Checkpoints of real runs: a full disk, a damaged file, frozen weights, blocking and asynchronous saves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e import preloaded
from tests.e2e.preloaded import wait_for
from tests.e2e.runs import SMALL, losses, train

PRETRAIN = ("stage=pretrain", "arch=xattn")


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts an empty disk of so many bytes at the checkpoints folder of the run `small`."""
    where = tmp_path / "runs" / "small" / "checkpoints"
    where.mkdir(parents=True)

    def mount(size: int) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)], capture_output=True)
        if done.returncode:
            pytest.skip("only root mounts a disk")
        return where

    yield mount
    subprocess.run(["umount", str(where)], capture_output=True)


@pytest.mark.parametrize("ways", ["parallel.data=2", "train.async_save=false"])
def test_a_full_disk_costs_the_checkpoint_alone(tmp_path, small_disk, ways):
    """Space for one and a half checkpoints: the first is written, the last is not."""
    where = small_disk(21_000_000)
    done = train(tmp_path, "name=small", ways, check=False)
    assert done.returncode != 0
    assert len(losses(where.parent)) == 6
    [line] = [line for line in done.stderr.splitlines() if line.startswith("checkpoint step_00000006 was not saved: ")]
    assert "No space left on device" in line
    assert "MB free in" in line
    assert "error: last checkpoint of the run" in done.stderr
    assert {path.name for path in where.iterdir()} == {"latest", "step_00000003"}
    assert (where / "latest").read_text() == "step_00000003\n"
    subprocess.run(["mount", "-o", "remount,size=64000000", str(where)], check=True)
    train(tmp_path, "name=small", "resume=auto", ways)
    assert (where / "latest").read_text() == "step_00000006\n"


def failures(where: Path) -> list[str]:
    """Lines that the run in `where` has printed about saves that failed."""
    output = where / "output"
    return [line for line in output.read_text().splitlines() if "was not saved" in line] if output.exists() else []


def test_a_save_that_failed_is_tried_again(tmp_path, small_disk):
    where = small_disk(40_000_000)
    (where / "filler").write_bytes(bytes(32_000_000))
    process = preloaded.start(tmp_path, *SMALL, "name=small", "train.steps=60", "train.save_every=20")
    wait_for(lambda: failures(tmp_path))
    (where / "filler").unlink()
    process.join(200)
    assert process.exitcode == 0
    [said] = failures(tmp_path)
    assert said.startswith("checkpoint step_00000020 was not saved: ")
    assert (where / "latest").read_text() in ("step_00000040\n", "step_00000060\n")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    where = tmp_path_factory.mktemp("whole")
    train(where, "name=whole", *PRETRAIN)
    return where / "runs" / "whole"


def copy_of(whole: Path, where: Path) -> Path:
    """A copy of the run, to resume from its step 3."""
    shutil.copytree(whole, where / "runs" / "whole")
    return where / "runs" / "whole" / "checkpoints"


def test_frozen_weights_are_stored_once_or_every_time(whole, tmp_path):
    checkpoints = copy_of(whole, tmp_path)
    assert (checkpoints / "frozen" / "digests.json").is_file()
    thin = (checkpoints / "step_00000006" / "__0_0.distcp").stat().st_size
    (checkpoints / "latest").write_text("step_00000003\n")
    train(tmp_path, "name=whole", "resume=auto", "train.save_frozen=true", "train.async_save=false", *PRETRAIN)
    assert losses(checkpoints.parent) == losses(whole)
    frozen = (checkpoints / "frozen" / "__0_0.distcp").stat().st_size
    thick = (checkpoints / "step_00000006" / "__0_0.distcp").stat().st_size
    assert thick == pytest.approx(thin + frozen, rel=0.01)
    shutil.rmtree(checkpoints / "frozen")
    shutil.rmtree(checkpoints / "step_00000003")
    (checkpoints.parent / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    train(tmp_path, "name=whole", "resume=auto", "train.steps=7", *PRETRAIN)  # the thick one is all that it needs


def test_a_resumed_run_drops_what_the_whole_one_would(tmp_path):
    options = ("name=lora", "peft=lora", "peft.dropout=0.5", "arch=decoder")
    train(tmp_path, *options)
    run = tmp_path / "runs" / "lora"
    before = losses(run)
    assert (run / "checkpoints" / "frozen").is_dir() and len(set(before)) == 6
    (run / "checkpoints" / "latest").write_text("step_00000003\n")
    train(tmp_path, *options, "resume=auto")
    assert losses(run) == before


def test_a_damaged_checkpoint_is_refused_and_the_way_out_works(whole, tmp_path):
    checkpoints = copy_of(whole, tmp_path)
    data = checkpoints / "step_00000006" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    # Made longer, because a run that is done has nothing to load.
    done = train(tmp_path, "name=whole", "resume=auto", *PRETRAIN, "train.steps=7", check=False)
    assert done.returncode == 2
    assert "__0_0.distcp is not what was written" in done.stderr
    assert "write step_00000003, which is intact, into runs/whole/checkpoints/latest" in done.stderr.replace(
        f"{tmp_path}/", ""
    )
    (checkpoints / "latest").write_text("step_00000003\n")
    train(tmp_path, "name=whole", "resume=auto", *PRETRAIN)
    assert losses(checkpoints.parent) == losses(whole)
