"""One run of a sweep as a process: started in its share of the machine, and why it ended. Imports no torch."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvlm.processes.workers import die_with_parent
from nvlm.sweep.shares import Share

LOG = "log.txt"
_TAIL = 64 * 2**10  # bytes of a log in which the reason for its run's end is looked for
_LONGEST = 1000  # characters of a reason
_LAUNCHER = re.compile(r"rank \d+ of \d+ ended with exit status")  # follows a traceback, whose last line says more


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run to be started. `folder`: its name in the sweep's folder; `steps`: the step of its last checkpoint."""

    folder: str
    command: tuple[str, ...]
    processes: int = 1
    steps: int = 0
    stop_seconds: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A run that was started at `since`, in seconds of time.monotonic(); its log was `log_size` bytes long then."""

    job: Job
    share: Share
    process: subprocess.Popen
    since: float
    log_size: int

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.since


def start(job: Job, share: Share, where: Path) -> Running:
    """Start `job` on its share's cores and GPUs, with its output in its folder's log. It dies with this process.

    It leads a session of its own, so a Ctrl-C in the terminal reaches only this process. Raises OSError.
    """
    parent = os.getpid()

    def settle() -> None:
        die_with_parent(parent)
        os.sched_setaffinity(0, share.cores)

    folder = where / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG, "ab") as log:
        log.write(f"$ {shlex.join(job.command)}\n".encode(errors="backslashreplace"))
        log.flush()
        size = log.tell()
        process = subprocess.Popen(
            job.command,
            env=_environment(os.environ, share, job.processes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=settle,
        )
    return Running(job=job, share=share, process=process, since=time.monotonic(), log_size=size)


def kill(running: Running) -> None:
    """Kill the run and what it has left behind in its session, and wait for its end."""
    try:
        os.killpg(running.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    running.process.wait()


def last_words(log: Path, start: int, code: int) -> str:
    """Why a run ended with exit status `code`, from what it wrote into `log` after its first `start` bytes."""
    try:
        with open(log, "rb") as file:
            file.seek(max(start, os.path.getsize(log) - _TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    spoken = [line for line in lines if not _LAUNCHER.match(line)] or lines
    if errors or (code >= 0 and spoken):
        return (errors or spoken)[-1][:_LONGEST]
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _environment(ours: Mapping[str, str], share: Share, processes: int) -> dict[str, str]:
    own = share.environment(processes)
    if "OMP_NUM_THREADS" in ours:
        own.pop("OMP_NUM_THREADS")
    return {**ours, **own}
