"""Runs as submitit jobs: when asked to end, save first; then requeue the job if the run is unfinished.

Imports neither torch nor submitit; only submitit's signal handler is used.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def in_job() -> bool:
    """Whether submitit started this process."""
    return "SUBMITIT_FOLDER" in os.environ


@contextmanager
def requeued(unfinished: Callable[[], bool]) -> Iterator[None]:
    """A block that trains. On SIGUSR2, submitit would requeue the job at once, in the middle of a step. Here the signal
    is turned into a SIGTERM, on which the run saves and ends, and submitit requeues after the block. It also does so
    if Slurm itself sent SIGTERM (preemption) and the run is `unfinished`. Outside submitit jobs it changes nothing."""
    if not in_job():
        yield
        return
    requeue, ignored = signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM)
    came = []

    def save_first(number: int, frame) -> None:
        came.append(number)
        if signal.getsignal(signal.SIGTERM) is ignored:  # training is not running, so nothing would be saved
            requeue(number, frame)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGUSR2, save_first)
    try:
        yield
    except SystemExit as end:
        if end.code and not came:
            raise
    finally:
        signal.signal(signal.SIGUSR2, requeue)
    if came or unfinished():
        requeue(signal.SIGUSR2, None)  # on the first task this ends the process
