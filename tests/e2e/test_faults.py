"""Faults provoked in real runs: signals, ranks that hang or stop, losses that are not finite."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nvlm.data.loader import Steps
from nvlm.train import loop
from nvlm.train.step import settle
from tests.e2e.faults import SMALL, TWO, latest, losses, replace_steps, rows
from tests.e2e.preloaded import alive, at, run, start, wait_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path):
    """Even after a failed test."""
    yield
    for pid in alive(tmp_path):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Losses of an undisturbed run, by number of processes."""
    found = {}
    for overrides in ((), TWO):
        where = tmp_path_factory.mktemp("unbroken")
        status, output = run(where, *SMALL, *overrides)
        assert status == 0, output
        found[len(overrides)] = losses(where)
    return found


# --- signals ---


@dataclasses.dataclass(frozen=True)
class Slow(Steps):
    """Takes a fifth of a second per step, so that a signal arrives in the middle of the run."""

    def __getitem__(self, step):
        time.sleep(0.2)
        return super().__getitem__(step)


def slow() -> None:
    replace_steps(Slow)


@pytest.mark.parametrize(("overrides", "number"), [((), signal.SIGTERM), (TWO, signal.SIGTERM), (TWO, signal.SIGINT)])
def test_a_signal_saves_and_a_second_run_goes_on_exactly(unbroken, tmp_path, overrides, number):
    process = start(tmp_path, *SMALL, *overrides, "train.stop_seconds=60", change=slow)
    wait_for(lambda: (now := at(tmp_path, 0)) and now.step >= 3)
    os.kill(process.pid, number)
    process.join(60)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 0, output
    done = latest(tmp_path)
    assert 3 <= done < 8
    assert f"stopped by {number.name} after step {done}, checkpoint saved" in output
    wait_for(lambda: not alive(tmp_path), 5)
    status, output = run(tmp_path, *SMALL, *overrides, "resume=auto")
    assert status == 0, output
    assert losses(tmp_path) == unbroken[len(overrides)]


@pytest.mark.slow
def test_one_worker_s_sigterm_under_torchrun_ends_all_of_them_well(unbroken, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "launch" / "train.py"), *SMALL, TWO[1], "train.steps=300"]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= 3)
    workers = [pid for pid in alive(tmp_path) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(workers[0], signal.SIGTERM)
    assert process.wait(60) == 0, (tmp_path / "output").read_text()
    assert f"stopped by SIGTERM after step {latest(tmp_path)}, checkpoint saved" in (tmp_path / "output").read_text()
    assert latest(tmp_path) == len(losses(tmp_path)) < 300


def test_a_signal_before_training_ends_the_run_at_once(tmp_path):
    process = start(tmp_path, *SMALL, *TWO)
    wait_for(lambda: at(tmp_path, 1))
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 1
    assert "killed by SIGTERM" in (tmp_path / "output").read_text()
    wait_for(lambda: not alive(tmp_path), 5)


# --- the watchdog ---


class Sleepy(Steps):
    """Rank 1 of 2 sleeps in its fifth step."""

    def __getitem__(self, step):
        if step == 4 and self.data_rank == 1:
            time.sleep(600)
        return super().__getitem__(step)


def sleepy() -> None:
    replace_steps(Sleepy)


LIMIT = 12.0  # seconds
WATCHED = [*SMALL, *TWO, f"parallel.timeout_minutes={LIMIT / 60}", "train.steps=2000"]


def test_a_rank_that_hangs_in_its_data_is_named_with_its_place(tmp_path):
    process = start(tmp_path, *WATCHED, change=sleepy)
    wait_for(lambda: (now := at(tmp_path, 1)) and (now.step, now.phase) == (5, "data"))
    began = time.monotonic()
    process.join(60)
    seconds = time.monotonic() - began
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 1, output
    where = "rank 1 of 2 (tensor 0, pipeline 0, context 0, data 1) has hung in phase data of step 5 for "
    assert where in output
    assert " s at test_faults.py:" in output
    assert "; the others wait for it" in output
    assert "time.sleep(600)" in output  # the line, in its stack
    assert output.count("has hung in phase") == 1
    assert "rank 0 of 2" not in output  # no other is blamed
    assert seconds < LIMIT + 8  # the report comes within the limit; the rest is the ending
    wait_for(lambda: not alive(tmp_path), 5)


class Crossed(Steps):
    """In the fifth step each rank waits for a message from the other."""

    def __getitem__(self, step):
        if step == 4:
            torch.distributed.recv(torch.zeros(1), src=1 - self.data_rank)
        return super().__getitem__(step)


def crossed() -> None:
    replace_steps(Crossed)


def test_ranks_that_wait_for_each_other_are_listed(tmp_path):
    status, output = run(tmp_path, *WATCHED, change=crossed)
    assert status == 1
    assert "all ranks have waited in collectives for " in output
    for rank in (0, 1):
        place = f"rank {rank} of 2 (tensor 0, pipeline 0, context 0, data {rank}) waits in phase data of step 5 at "
        assert output.count(f"{place}test_faults.py:") == 1


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named(tmp_path, rank):
    process = start(tmp_path, *WATCHED)
    pid = wait_for(lambda: (now := at(tmp_path, rank)) and now.step >= 3 and now.pid)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    process.join(60)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 1, output
    named = [line for line in output.splitlines() if "has not answered" in line]
    assert len(named) == 1, output
    assert named[0].startswith(f"rank {rank} of 2")
    assert time.monotonic() - began < LIMIT + 8
    wait_for(lambda: not alive(tmp_path), 5)


# --- the guard ---


class Poisoned(Steps):
    """One replica's pixels are NaN in two steps, as with a broken encoder."""

    def __getitem__(self, step):
        data = super().__getitem__(step)
        if step not in (3, 4) or self.data_rank != self.data_size - 1:
            return data
        return dataclasses.replace(data, micro_batches=tuple(map(poison, data.micro_batches)))


@dataclasses.dataclass(frozen=True)
class NotANumber:
    """A batch whose encoded tiles become NaN."""

    batch: object

    def __getattr__(self, name):
        return getattr(self.batch, name)

    def to(self, device):
        return poison(self.batch.to(device))

    def with_some_features(self, features, rows):
        return self.batch.with_some_features(features * float("nan"), rows)


def poison(batch):
    return NotANumber(batch)


def poisoned() -> None:
    replace_steps(Poisoned)
    report_state()


class Hopeless(Poisoned):
    """All steps are bad from the fourth on."""

    def __getitem__(self, step):
        data = Steps.__getitem__(self, step)
        return data if step < 3 else dataclasses.replace(data, micro_batches=tuple(map(poison, data.micro_batches)))


def hopeless() -> None:
    replace_steps(Hopeless)


def report_state() -> None:
    """Print a digest of weights and Adam's state after each step."""
    step = loop.train_step

    def told(trainer, *arguments):
        result = step(trainer, *arguments)
        settle(trainer)  # else the next forward brings what other ranks have updated
        digest = hashlib.sha256()
        inner = [one.optimizer for one in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])]
        state = [value for one in inner for values in one.state.values() for value in values.values()]
        for tensor in [*trainer.chunks[0].parameters(), *filter(torch.is_tensor, state)]:
            digest.update(tensor.detach().float().numpy().tobytes())
        with open(f"state.{os.environ['RANK']}", "a") as file:
            file.write(digest.hexdigest() + "\n")
        return result

    loop.train_step = told


@pytest.mark.parametrize(
    "overrides", [[], TWO, ["parallel.data=2", "precision=bf16"], [*TWO, "precision=bf16"], ["parallel.tensor=2"]]
)
def test_a_step_that_is_no_number_changes_nothing_on_any_rank(tmp_path, overrides):
    status, output = run(tmp_path, *SMALL, *overrides, change=poisoned)
    assert status == 0, output
    assert [row["updated"] for row in rows(tmp_path)] == [True] * 3 + [False] * 2 + [True] * 3
    assert [row["skipped_updates"] for row in rows(tmp_path)] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert all(row["loss"] == row["loss"] for row in rows(tmp_path) if row["updated"])
    assert len({row["lr"] for row in rows(tmp_path)[3:5]}) == 2  # the schedule goes on
    for file in tmp_path.glob("state.*"):
        states = file.read_text().splitlines()
        assert states[2] == states[3] == states[4]
        assert len(set(states[1:3] + states[5:])) == 5  # a good step does change it; the first has a rate of 0
    assert list(tmp_path.glob("state.*"))


def test_too_many_bad_steps_stop_the_run_with_the_samples_named(tmp_path):
    arguments = [*SMALL, *TWO, "train.max_bad_steps=3", "train.save_every=2"]
    status, output = run(tmp_path, *arguments, change=hopeless)
    assert status == 1
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "error: step 6: loss nan" in errors[0]
    assert "3 bad steps in a row" in errors[0]
    assert len(errors[0].split("Samples of this step: ")[1].split(". Fix")[0].split(", ")) == 4
    assert "Traceback" not in output
    assert latest(tmp_path) == 2  # and none at step 4 and 6
    status, output = run(tmp_path, *arguments, "resume=auto")
    assert status == 0, output
    assert len(losses(tmp_path)) == 8


def test_a_leaping_loss_is_not_learned_from_and_a_resumed_run_judges_alike(tmp_path):
    """Provoked by a learning rate that explodes during warm-up."""
    arguments = [*SMALL, "optim.lr=3", "optim.warmup=15", "train.steps=16", "train.max_bad_steps=100"]
    arguments += ["train.spike_factor=1.2", "train.save_every=5", "train.keep=9"]
    status, output = run(tmp_path, *arguments)
    assert status == 0, output
    whole = [(row["loss"], row["updated"], row["skipped_updates"]) for row in rows(tmp_path)]
    leaps = [step for step, (_, updated, _) in enumerate(whole, start=1) if not updated]
    assert leaps, whole
    assert min(leaps) > 10  # not judged before there is a mean
    assert f"step {leaps[0]}: loss" in output
    (tmp_path / "runs" / "run" / "checkpoints" / "latest").write_text("step_00000010\n")
    status, output = run(tmp_path, *arguments, "resume=auto")
    assert status == 0, output
    assert [(row["loss"], row["updated"], row["skipped_updates"]) for row in rows(tmp_path)] == whole
