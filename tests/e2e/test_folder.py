"""Two starts of the same run, and foreign files in a run's folder."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nvlm.data.loader import Steps
from nvlm.runs.ownership import owned
from tests.e2e.faults import SMALL, replace_steps, rows
from tests.e2e.preloaded import alive, at, run, start, wait_for
from tests.ports import free_port


@pytest.fixture
def places(tmp_path):
    """Working directories of two starts; leftover processes of both are ended."""
    found = [tmp_path / "first", tmp_path / "second"]
    for where in found:
        where.mkdir()
    yield found
    for where in found:
        for pid in alive(where):
            os.kill(pid, signal.SIGKILL)


class Held(Steps):
    """Waits for a file in its fourth step."""

    def __getitem__(self, step):
        while step == 3 and not Path("go on").exists():
            time.sleep(0.05)
        return super().__getitem__(step)


def hold() -> None:
    replace_steps(Held)


def test_a_second_start_is_refused_and_the_first_ends_as_it_began(places):
    first, second = places
    folder = f"hydra.run.dir={first / 'runs' / 'run'}"
    process = start(first, *SMALL, folder, change=hold)
    wait_for(lambda: (now := at(first, 0)) and now.step >= 3)
    for resume in ("never", "auto"):
        status, output = run(second, *SMALL, folder, "seed=9", f"resume={resume}")
        assert status == 2 and f"one in use by process {process.pid} on " in output
    (first / "go on").touch()
    process.join(60)
    assert process.exitcode == 0, (first / "output").read_text()
    assert [row["step"] for row in rows(first)] == list(range(1, 9))
    assert OmegaConf.load(first / "runs" / "run" / "config.yaml").seed == 1234


def be_rank(rank: int, port: int) -> None:
    """Run as a rank started by torchrun."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_the_other_ranks_of_torchrun_end_with_the_first_one_that_may_not_start(places, tmp_path):
    port = free_port()
    with owned(tmp_path / "run"):
        ranks = [
            start(where, *SMALL, f"hydra.run.dir={tmp_path / 'run'}", change=functools.partial(be_rank, rank, port))
            for rank, where in enumerate(places)
        ]
        for process in ranks:
            process.join(60)
    said = [(where / "output").read_text() for where in places]
    assert [process.exitcode for process in ranks] == [2, 2], said
    assert f"in use by process {os.getpid()} on " in said[0] and "error" not in said[1]


def test_somebody_else_s_metrics_are_not_lost(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "metrics.jsonl").write_text("precious\n")
    status, output = run(tmp_path, *SMALL, f"hydra.run.dir={theirs}")
    assert status == 2 and "got metrics.jsonl, which would be overwritten" in output
    assert [path.name for path in theirs.iterdir()] == ["metrics.jsonl"]
    assert (theirs / "metrics.jsonl").read_text() == "precious\n"
