"""Worker processes on one machine: started together, ended together, never left behind.

Imports no torch. Each worker leads its own process group, which contains its forks: data loaders and writers.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

EXPLAINED = 3  # exit status of a worker that has reported why it ends
_ERRORS = "NVLM_ERRORS"  # environment variable: the file descriptor for the workers' error messages
_POLL = 0.05  # seconds
_SETTLE = 0.3  # seconds after the first failure in which other failures are collected
_GRACE = 3.0  # seconds between SIGTERM and SIGKILL for workers whose peer died
_libc = ctypes.CDLL(None)


LISTENER = "NVLM_LISTENER"
"""Environment variable: the file descriptor of the socket at MASTER_PORT. It listens from the start, so that no other
process can take the port while rank 0 does its imports."""


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, with process id `parent`, ends for whatever reason."""
    pr_set_pdeathsig = 1
    _libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def take_forks_along() -> None:
    """Make everything that this process or its libraries fork from now on die with it."""
    parent = [os.getpid()]
    os.register_at_fork(
        before=lambda: parent.__setitem__(0, os.getpid()), after_in_child=lambda: die_with_parent(parent[0])
    )


class Signals:
    """Context manager that records SIGTERM and SIGINT in `came`.

    On exit the previous handlers are restored and receive the signal, unless it was obeyed. After obey() the process
    is about to end, and further signals are ignored.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self._obeyed = False

    def __enter__(self) -> Signals:
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, lambda got, _: self.came.append(got)) for number in numbers}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._obeyed else handler)
        if self.came and not self._obeyed:
            os.kill(os.getpid(), self.came[0])

    def obey(self) -> None:
        """Mark the signal as handled, by this rank or, for all of them, by another."""
        self._obeyed = True


def run_workers(
    command: Sequence[str],
    count: int,
    environment: Mapping[str, str],
    stop_seconds: float,
    inherit: Sequence[int] = (),
) -> tuple[int, bool]:
    """Run `command` as `count` workers until all end; returns (exit status, whether SIGTERM or SIGINT ended them).

    The status is 0, 2 if a worker's configuration was refused, else 1. Signals are passed on to the workers,
    which are killed if they still run `stop_seconds` later. `inherit`: file descriptors that the workers get.
    """
    reader, writer = os.pipe()
    with Signals() as signals:
        workers: list[subprocess.Popen] = []
        try:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                host, port = listener.getsockname()
                address = {"MASTER_ADDR": host, "MASTER_PORT": str(port), _ERRORS: str(writer)}
                for rank in range(count):
                    own = {LISTENER: str(listener.fileno())} if rank == 0 else {}
                    descriptors = (writer, *inherit, *map(int, own.values()))
                    workers.append(_start(command, rank, count, dict(environment) | address | own, descriptors))
            _await(workers, signals.came, stop_seconds)
            _end(workers)
        finally:
            _kill(workers)
            os.close(writer)
            _print_errors(reader)
        stopped = bool(signals.came)
        if stopped:
            signals.obey()
    codes = [worker.returncode for worker in workers]
    return (0 if not any(codes) else 2 if 2 in codes else 1), stopped


def report(message: str) -> None:
    """Report why the run ends: through the launcher, which prints a message of several ranks only once."""
    if _ERRORS in os.environ:
        os.write(int(os.environ[_ERRORS]), f"{message}\0".encode(errors="backslashreplace"))
    elif os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def _start(command: Sequence[str], rank: int, count: int, environment: dict, inherit: Sequence[int]):
    launcher = os.getpid()
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return subprocess.Popen(
        command,
        env=environment | {name: str(value) for name, value in ranks.items()},
        start_new_session=True,
        pass_fds=tuple(inherit),
        preexec_fn=lambda: die_with_parent(launcher),
    )


def _await(workers: list[subprocess.Popen], came: list[int], stop_seconds: float) -> None:
    """Wait until all workers have ended, one has failed, or the time after a signal is over."""
    deadline = math.inf
    while _running(workers) and not _failed(workers):
        if came and deadline == math.inf:
            deadline = time.monotonic() + stop_seconds
            for worker in workers:
                worker.send_signal(came[0])
        if time.monotonic() > deadline:
            print(f"workers still running {stop_seconds:g} s after {_name(came[0])}: killed", file=sys.stderr)
            return
        if came.count(signal.SIGINT) > 1:  # a second Ctrl-C
            return
        time.sleep(_POLL)


def _end(workers: list[subprocess.Popen]) -> None:
    """Name the workers that failed and give the others a moment to end."""
    if not _failed(workers):
        return
    time.sleep(_SETTLE)
    killed = [worker for worker in _failed(workers) if worker.returncode < 0]
    # Workers whose peer was killed fail as well, but they are not the cause.
    for worker in killed or _failed(workers):
        if worker.returncode not in (2, EXPLAINED):
            print(f"rank {workers.index(worker)} of {len(workers)} {_fate(worker.returncode)}", file=sys.stderr)
    for worker in _running(workers):
        worker.terminate()
    deadline = time.monotonic() + _GRACE
    while _running(workers) and time.monotonic() < deadline:
        time.sleep(_POLL)


def _kill(workers: list[subprocess.Popen]) -> None:
    for worker in workers:
        try:
            os.killpg(worker.pid, signal.SIGKILL)  # including what an ended worker left behind
        except ProcessLookupError:
            pass
    for worker in workers:
        worker.wait()


def _running(workers: list[subprocess.Popen]) -> list[subprocess.Popen]:
    return [worker for worker in workers if worker.poll() is None]


def _failed(workers: list[subprocess.Popen]) -> list[subprocess.Popen]:
    return [worker for worker in workers if worker.poll()]


def _fate(code: int) -> str:
    return f"was killed by {_name(-code)}" if code < 0 else f"ended with exit status {code}"


def _name(number: int) -> str:
    return signal.Signals(number).name


def _print_errors(reader: int) -> None:
    with open(reader, "rb") as pipe:
        messages = pipe.read().decode().split("\0")
    for message in dict.fromkeys(filter(None, messages)):
        print(message, file=sys.stderr)
