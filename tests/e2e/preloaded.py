"""Whole runs without their imports: launcher and workers are forked from a server that has imported everything.

The processes are the same as with `python launch/train.py` and can be killed like them; only exec is left out, and with
it ten seconds of imports per run. All of a run's processes work in its folder, by which `alive` finds them. Each worker
keeps a file `rank.N` there with its process id, step and phase.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nvlm.commands import launch, train
from nvlm.processes import workers
from nvlm.sweep import process as sweep_process
from nvlm.train import loop, watch
from tests.server import CONTEXT


@dataclass(frozen=True)
class At:
    """How far a rank is."""

    pid: int
    step: int
    phase: str


def start(where: Path, *overrides: str, change: Callable[[], None] | None = None):
    """A running `launch/train.py` in `where`, its output in where/output; `change` is called in each worker first."""
    for path in where.glob("rank.*"):
        path.unlink()
    process = CONTEXT.Process(target=_launch, args=(where, overrides, change))
    process.start()
    return process


def run(
    where: Path, *overrides: str, change: Callable[[], None] | None = None, timeout: float = 120
) -> tuple[int, str]:
    """Exit status and output of a whole run."""
    process = start(where, *overrides, change=change)
    process.join(timeout)
    stuck = process.is_alive()
    process.kill()
    output = (where / "output").read_text()
    assert not stuck, output
    return process.exitcode, output


def at(where: Path, rank: int) -> At | None:
    """How far `rank` is; None before it has started."""
    try:
        pid, step, phase = (where / f"rank.{rank}").read_text().split()
    except FileNotFoundError:
        return None
    return At(int(pid), int(step), phase)


def alive(where: Path) -> list[int]:
    """Processes that work in `where`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(where):
                found.append(int(entry.name))
        except OSError:  # it has ended, or is ending
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float = 120):
    """The result of `condition` as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (got := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
    return got


class _Forked:
    """The part of subprocess.Popen that the launcher uses, with a fork of this process as the worker."""

    def __init__(self, command, env, start_new_session, pass_fds, preexec_fn) -> None:
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT):  # as exec would
                signal.signal(number, signal.SIG_DFL)
            preexec_fn()
            os.environ.update(env)
            sys.argv = command[2:]
            _tell("0 start")
            _exit(launch._worker)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.005)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


class _ForkedRun(_Forked):
    """The same for a run of a sweep, whose output goes to a file."""

    def __init__(self, command, env, stdin, stdout, stderr, start_new_session, preexec_fn) -> None:
        self.returncode = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            preexec_fn()
            os.environ.update(env)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            sys.argv = ["train.py", *command[2:]]
            _exit(lambda: train.main(time.time()))


def _launch(where: Path, overrides, change) -> None:
    workers.die_with_parent(os.getppid())  # the server, which ends with the tests, however they do
    multiprocessing.set_start_method("fork", force=True)  # a child of the server would start loaders by a server, too
    os.chdir(where)
    os.environ["COLUMNS"] = "200"  # lines are not folded
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    workers.subprocess = types.SimpleNamespace(Popen=_Forked)
    sweep_process.subprocess = types.SimpleNamespace(Popen=_ForkedRun, DEVNULL=None, STDOUT=None)
    mark = watch.Watchdog.mark

    def told(self, step, phase):
        _tell(f"{step} {phase}")
        mark(self, step, phase)

    watch.Watchdog.mark = told
    if change:
        change()
    sys.argv = ["train.py", *overrides]
    _exit(lambda: train.main(time.time()))


def _tell(text: str) -> None:
    path = Path(f"rank.{os.environ['RANK']}")
    aside = path.with_suffix(f"{path.suffix}.{os.getpid()}")  # the runs of a sweep work in the same folder
    aside.write_text(f"{os.getpid()} {text}")
    os.replace(aside, path)


def _exit(main: Callable[[], int]) -> None:
    """End this fork with the status of `main` instead of returning into the server."""
    try:
        status = main()
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


assert loop  # imported for the server
