"""Ends a run that receives a signal while it waits for data: it cannot stop after a step that never starts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from nvlm.processes.workers import EXPLAINED, report

_POLL = 0.2  # seconds


def impatient[Item](items: Iterable[Item], came: Sequence[int], seconds: float) -> Iterator[Item]:
    """`items`, one by one. If a signal has arrived in `came` and the next item takes longer than `seconds` from then
    on, the process exits with status `EXPLAINED`. A thread does this, because the main thread may be blocked where no
    signal interrupts it."""
    waiting, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=_watch, args=(waiting, done, came, seconds), name="impatient", daemon=True)
    thread.start()
    try:
        iterator = iter(items)
        while True:
            waiting.set()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                waiting.clear()
            yield item
    finally:
        done.set()
        thread.join()


def _watch(waiting: threading.Event, done: threading.Event, came: Sequence[int], seconds: float) -> None:
    while not done.wait(_POLL):
        begun = time.monotonic()
        while came and waiting.is_set() and not done.wait(_POLL):
            if time.monotonic() - begun > seconds:
                name = signal.Signals(came[0]).name
                report(
                    f"stopped by {name} while waiting for data, which did not arrive in {seconds:g} s: nothing saved"
                )
                os._exit(EXPLAINED)
