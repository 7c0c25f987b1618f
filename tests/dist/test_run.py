"""Tests that are interrupted or killed leave no process behind: no rank, no fork server, no resource tracker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.alive import alive

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import os, sys, time
from pathlib import Path
from tests.dist.run import run_distributed

def hang():
    Path(f"ready{os.environ['RANK']}").touch()
    time.sleep(600)

if __name__ == "__main__":
    run_distributed(hang, 2)
"""


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_nothing_outlives_the_tests(tmp_path, number):
    (tmp_path / "hanging.py").write_text(TESTS)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "NVLM_TEST_PRELOAD": "hanging"}
    process = subprocess.Popen(
        [sys.executable, "hanging.py"],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_for(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists(), 120)
        assert len(alive(tmp_path)) == 5  # the tests, a server, its tracker and two ranks
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.kill()
        process.wait(60)
        wait_for(lambda: not alive(tmp_path), 30)
    finally:
        for pid in alive(tmp_path):
            os.kill(int(pid), signal.SIGKILL)
