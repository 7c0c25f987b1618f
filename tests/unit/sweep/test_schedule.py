"""The loop of a sweep, with shell commands as its runs: order, cores, failures, signals, kills, the lock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvlm.config.values import ConfigError
from nvlm.runs.ownership import locked
from nvlm.sweep import ledger
from nvlm.sweep.ledger import Row
from nvlm.sweep.process import LOG, Job
from nvlm.sweep.schedule import run_jobs
from nvlm.sweep.shares import Share

ROOT = Path(__file__).resolve().parents[3]
CORES = sorted(os.sched_getaffinity(0))
SHARES = [Share((CORES[0],), ("0",)), Share((CORES[-1],), ("1",))]


def job(folder: str, script: str, **values) -> Job:
    return Job(folder=folder, command=("sh", "-c", script), **values)


def sweep(where: Path, jobs, shares=SHARES, show=lambda state: None):
    """Rows by folder, the signal, and the rows that were kept at each change."""
    kept = []
    rows = {one.folder: Row(folder=one.folder) for one in jobs}
    rows, stopped = run_jobs(jobs, shares, where, rows, kept.append, show)
    return rows, stopped, kept


def log(where: Path, folder: str) -> str:
    return (where / folder / LOG).read_text()


def gone(pid: int) -> bool:
    """Whether the process ends within some seconds; a zombie has ended."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_as_many_runs_at_a_time_as_there_are_shares_in_their_order(tmp_path):
    seen = []
    jobs = [job(name, "sleep 0.15") for name in "abcd"]
    rows, stopped, kept = sweep(tmp_path, jobs, show=lambda state: seen.append([r.job.folder for r in state.running]))
    assert max(map(len, seen)) == 2 and seen[0] == ["a", "b"]
    begun = [name for now in kept for name, row in now.items() if row.status == "running"]
    assert list(dict.fromkeys(begun)) == ["a", "b", "c", "d"]
    assert stopped is None and {row.status for row in rows.values()} == {"done"}
    assert all(row.seconds >= 0.1 for row in rows.values())


def test_each_run_has_its_cores_its_gpus_and_its_threads(tmp_path):
    tell = "grep Cpus_allowed_list /proc/self/status; echo $CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS; sleep 0.3"
    jobs = [job("a", tell), job("b", tell)]
    del os.environ["OMP_NUM_THREADS"]
    sweep(tmp_path, jobs)
    for folder, share in zip("ab", SHARES):
        assert f"Cpus_allowed_list:\t{share.cores[0]}\n{share.gpus[0]} 1\n" in log(tmp_path, folder)


def test_a_failed_run_ends_only_itself_and_says_why(tmp_path):
    broken = "echo error: step 3: loss nan, ... Fix: lower optim.lr; echo rank 0 of 1 ended with exit status 1; exit 1"
    traceback = "echo Traceback; echo ValueError: bad; echo rank 0 of 1 ended with exit status 1 >&2; exit 1"
    jobs = [
        job("diverged", broken),
        job("bug", traceback),
        job("killed", "kill -9 $$"),
        job("silent", "exit 7"),
        Job(folder="missing", command=("/no/such/program",)),
        job("short", "echo stopped by SIGTERM after step 2", steps=5),  # exit status 0, but no checkpoint of step 5
        job("good", "true"),
    ]
    rows, stopped, kept = sweep(tmp_path, jobs)
    assert {name: row.reason for name, row in rows.items() if row.status == "failed"} == {
        "diverged": "step 3: loss nan, ... Fix: lower optim.lr",
        "bug": "ValueError: bad",
        "killed": "killed by SIGKILL",
        "silent": "exit status 7",
        "missing": "it could not be started: No such file or directory",
        "short": "stopped by SIGTERM after step 2",
    }
    assert rows["good"].status == "done" and stopped is None


def test_a_share_whose_cores_are_gone_fails_its_run(tmp_path):
    rows, _, _ = sweep(tmp_path, [job("a", "true")], shares=[Share((100_000,))])
    assert rows["a"].status == "failed" and "could not be started" in rows["a"].reason


def test_the_reason_is_of_the_last_attempt(tmp_path):
    sweep(tmp_path, [job("a", "echo error: first; exit 1")])
    rows, _, _ = sweep(tmp_path, [job("a", "echo error: second; exit 1")])
    assert rows["a"].reason == "second"
    rows, _, _ = sweep(tmp_path, [job("a", "exit 1")])
    assert rows["a"].reason == "exit status 1"
    assert "first" in log(tmp_path, "a")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_runs_which_may_still_save(tmp_path, number):
    saves = "trap 'echo saved; exit 0' TERM INT; echo ready; while :; do sleep 0.05; done"

    def send(state):
        if len(state.running) == 2 and all("ready" in log(tmp_path, one.job.folder) for one in state.running):
            os.kill(os.getpid(), number)

    rows, stopped, kept = sweep(tmp_path, [job(name, saves) for name in "abc"], show=send)
    assert stopped == number
    assert [row.status for row in rows.values()] == ["waiting"] * 3 == [row.status for row in kept[-1].values()]
    assert "saved" in log(tmp_path, "a") and "saved" in log(tmp_path, "b")
    assert not (tmp_path / "c").exists()


def test_a_second_interrupt_kills_what_does_not_end(tmp_path):
    deaf = "trap '' TERM INT; echo ready; while :; do sleep 0.05; done"
    processes = []

    def send(state):
        processes[:] = [one.process.pid for one in state.running]
        if all("ready" in log(tmp_path, one.job.folder) for one in state.running):
            os.kill(os.getpid(), signal.SIGINT)

    began = time.monotonic()
    rows, stopped, _ = sweep(tmp_path, [job("a", deaf)], show=send)
    assert time.monotonic() - began < 5 and stopped == signal.SIGINT and rows["a"].status == "waiting"
    assert all(map(gone, processes))


def test_a_run_that_does_not_end_in_time_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("nvlm.sweep.schedule._EXTRA", 0.1)
    deaf = job("a", "trap '' TERM; echo ready; while :; do sleep 0.05; done", stop_seconds=0.1)
    asked = []

    def send(state):
        if not asked and "ready" in log(tmp_path, "a"):
            asked.append(os.kill(os.getpid(), signal.SIGTERM))

    rows, stopped, _ = sweep(tmp_path, [deaf], show=send)
    assert stopped == signal.SIGTERM and rows["a"].status == "waiting"


ALONE = """
import os, sys
from pathlib import Path
from nvlm.runs.ownership import locked
from nvlm.sweep import ledger
from nvlm.sweep.process import Job
from nvlm.sweep.schedule import run_jobs
from nvlm.sweep.shares import Share
where = Path(sys.argv[1])
share = Share(tuple(os.sched_getaffinity(0)))
jobs = [Job(folder="a", command=("sh", "-c", "echo $$; exec sleep 600"))]
with locked(where, "sweep"):
    rows = {"a": ledger.Row(folder="a")}
    run_jobs(jobs, [share], where, rows, lambda now: ledger.write(where, "again", now), lambda state: None)
"""


def test_a_killed_sweep_leaves_no_run_and_no_lock_behind(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", ALONE, str(tmp_path)], env=environment) as process:
        deadline = time.monotonic() + 60
        while "a" not in ledger.read(tmp_path) or len(log(tmp_path, "a").splitlines()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(ConfigError, match=f"sweep folder .*: got one in use by process {process.pid} on"):
            with locked(tmp_path, "sweep"):
                pass
        process.kill()
    assert gone(int(log(tmp_path, "a").splitlines()[1]))
    with locked(tmp_path, "sweep"):
        assert ledger.read(tmp_path)["a"].status == "running"
    assert json.loads((tmp_path / "sweep.json").read_text())["command"] == "again"
