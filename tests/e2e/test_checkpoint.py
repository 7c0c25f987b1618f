"""Checkpoints of real runs: a disk that is full, a damaged file, frozen weights, one writer or another."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.test_train import losses, train

PRETRAIN = ("name=run", "stage=pretrain", "arch=xattn")


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts an empty disk of so many bytes where a run puts its checkpoints."""
    where = tmp_path / "runs" / "run" / "checkpoints"
    where.mkdir(parents=True)

    def mount(size: int) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)], capture_output=True)
        if done.returncode:
            pytest.skip("only root mounts a disk")
        return where

    yield mount
    subprocess.run(["umount", str(where)], capture_output=True)


@pytest.mark.parametrize("layout", ["parallel.data=1", "parallel.data=2"])
def test_a_full_disk_costs_a_checkpoint_and_no_more(tmp_path, small_disk, layout):
    """Room for one checkpoint and a half: the first save works, the last one fails."""
    where = small_disk(14_000_000)
    done = train(tmp_path, "name=run", "train.keep=1", layout, check=False)
    assert done.returncode != 0
    assert len(losses(where.parent)) == 6
    [line] = [line for line in done.stderr.splitlines() if line.startswith("checkpoint step_00000006 is not saved")]
    assert "No space left on device" in line
    assert "MB free" in line
    assert "last checkpoint of the run" in done.stderr
    assert {path.name for path in where.iterdir()} == {"latest", "step_00000003"}
    subprocess.run(["mount", "-o", "remount,size=64000000", str(where)], check=True)
    train(tmp_path, "name=run", "resume=auto", "train.keep=1", layout)
    assert {path.name for path in where.iterdir()} == {"latest", "step_00000006"}


def test_a_save_that_fails_is_tried_again(tmp_path, small_disk):
    """Something fills the disk for a while: room is made as soon as a save has failed, and the next one works."""
    where = small_disk(14_000_000)
    filler = where / "filler"
    filler.write_bytes(bytes(10_000_000))
    script = (
        "import sys; from pathlib import Path; from nvlm.train import checkpoint; save = checkpoint.Checkpoints.save\n"
        "def and_make_room(self, *rest):\n"
        "    save(self, *rest); self.poll(wait=True); print('reason', self.failure)\n"
        f"    Path({str(filler)!r}).unlink(missing_ok=True)\n"
        "checkpoint.Checkpoints.save = and_make_room\n"
        "from nvlm.launch import _worker; sys.exit(_worker())"
    )
    train(tmp_path, "name=plan", "train.steps=3")
    config = (tmp_path / "runs" / "plan" / "config.yaml").read_text().replace("steps: 3", "steps: 6")
    (where.parent / "config.yaml").write_text(config)
    from tests.e2e.test_train import ROOT
    import os, sys

    done = subprocess.run(
        [sys.executable, "-c", script, str(where.parent / "config.yaml"), "0"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
