"""A run on a disk with room only for its checkpoints, and with a standard output that cannot be written."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from nvlm.data.loader import Steps
from tests.boards import scalars
from tests.e2e.faults import SMALL, latest, replace_steps, rows
from tests.e2e.preloaded import alive, run

FILLER = Path("runs", "run", "filler")


class Filling(Steps):
    """The disk is full during steps 3 to 13: more rows than fit into the rest of a file's last page."""

    def __getitem__(self, step):
        if step == 2:
            with open(FILLER, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(512))
                except OSError:
                    pass
        if step == 13:
            FILLER.unlink()
        return super().__getitem__(step)


def fill() -> None:
    replace_steps(Filling)
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.fixture
def small_disk(tmp_path):
    """The run's folder on a separate disk, with its checkpoints elsewhere."""
    where = tmp_path / "runs" / "run"
    where.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500000", "tmpfs", str(where)], capture_output=True)
    if done.returncode:
        pytest.skip("only root mounts a disk")
    (tmp_path / "checkpoints").mkdir()
    (where / "checkpoints").symlink_to(tmp_path / "checkpoints")
    yield where
    for pid in alive(tmp_path):
        os.kill(pid, signal.SIGKILL)
    subprocess.run(["umount", "-l", str(where)], capture_output=True)


def test_a_full_disk_and_a_broken_console_cost_a_line_each(tmp_path, small_disk):
    status, output = run(tmp_path, *SMALL, "train.steps=16", "train.save_every=4", change=fill)
    assert status == 0, output
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 17))
    assert set(scalars(small_disk / "tensorboard")) == set(range(1, 17))
    assert latest(tmp_path) == 16
    assert output.count("metrics.jsonl cannot be written (No space left on device): training goes on") == 1
    assert output.count("metrics.jsonl can be written again") == 1
    assert output.count("standard output cannot be written (No space left on device): training goes on") == 1
    assert "Traceback" not in output


def test_an_evaluation_without_room_tells_its_score(tmp_path, small_disk):
    evaluated = small_disk / "evaluation" / "heldout" / "step_00000003"
    evaluated.mkdir(parents=True)
    (evaluated / "score.json").write_text("of an older evaluation")
    with open(small_disk / "config.yaml", "w") as file:  # the folder is a run's
        file.write("".join(f"{group}: {{}}\n" for group in "arch llm vision tiling data stage train optim".split()))
    few = ["train.steps=3", "evaluate.questions=2", "evaluate.batch=2", "evaluate.max_new_tokens=2"]
    status, output = run(tmp_path, *SMALL, *few, change=fill)
    assert status == 0, output
    assert "the evaluation's files cannot be written: No space left on device" in output
    assert not (evaluated / "score.json").exists() and not (small_disk / "report.html").exists()
