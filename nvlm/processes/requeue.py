"""A run that submitit started as a job: asked to end it saves first, and an unfinished one goes back to the queue.

Imports neither torch nor submitit, whose signal handler is all that is used of it.
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
    """A block that trains. On SIGUSR2 submitit requeues a job at once, in the middle of a step: here it becomes the
    SIGTERM on which a run saves and ends, and submitit has its turn behind the block; so it has where Slurm sent a
    SIGTERM by itself (pre-emption) and the run is `unfinished`. Outside of submitit's jobs it changes nothing."""
    if not in_job():
        yield
        return
    requeue, ignored = signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM)
    came = []

    def save_first(number: int, frame) -> None:
        came.append(number)
        if signal.getsignal(signal.SIGTERM) is ignored:  # nobody would save
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
        requeue(signal.SIGUSR2, None)  # on the first task it ends the process
