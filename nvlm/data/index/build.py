"""Builds the index of a source, in this process or in several. Imports no torch."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from nvlm.config.values import ConfigError, problem
from nvlm.data.index.files import Meta
from nvlm.data.index.join import join
from nvlm.data.index.opened import check_files, open_index
from nvlm.data.index.state import settings_of, states_of, with_digests
from nvlm.data.index.walk import Walk, opened
from nvlm.data.sources.json_places import PLACE
from nvlm.data.sources.registry import build_source
from nvlm.processes.workers import die_with_parent

Report = Callable[[int, int], None]
"""Called with how many records or files are done, and how many there are."""
Task = tuple[Callable[..., None], tuple, int]
"""A function, its arguments, and how many records or files it does."""


def prepare(walk: Walk, folder: Path, workers: int, report: Report) -> Meta:
    """The index in `folder` of the source of `walk`, built unless it is there and not stale.

    `workers`: number of processes. Raises ConfigError.
    """
    opened.cache_clear()  # what an earlier call in this process opened may have changed
    if (meta := _kept(walk, folder)) is not None:
        return meta
    walk.folder.mkdir(parents=True, exist_ok=True)
    places = walk.places_files()
    _run([(walk.find, one, 1) for one in places.items()], workers, report)
    walk.join_places()
    records, chunks = opened(walk), walk.chunks()
    before = states_of(records.files)
    _run([(walk.measure, one, len(one[0])) for one in chunks.items()], workers, report)
    joined = walk.folder / "joined"
    counts = join(joined, walk.joined_places, list(chunks.values()))
    if states_of(records.files) != before:
        raise problem("data.index", "files that changed while they were read", "files that stay", "start it again")
    rows = {file: target.stat().st_size // PLACE.itemsize for file, target in places.items()}
    files = with_digests(before, records.files)
    files = tuple(replace(state, rows=rows.get(file)) for state, file in zip(files, records.files, strict=True))
    meta = Meta(settings_of(walk.source, walk.name, walk.seed, walk.processor), files, **counts)
    meta.write(joined)
    _publish(joined, folder)
    shutil.rmtree(walk.folder)
    return meta


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the block, no other process prepares an index in `folder`. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except (FileExistsError, NotADirectoryError):
        raise problem("data.index", f"{folder}, a file or in one", "a folder", "data.index=DIR") from None
    except OSError as error:
        reason = error.strerror or error
        raise problem("data.index", f"{folder}: {reason}", "a folder that can be written", "data.index=DIR") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            got = f"{folder}, in which another process prepares an index"
            raise problem("data.index", got, "one process", "wait for it, or data.index=OTHER") from None
        except OSError:  # some network file systems have no locks
            pass
        yield


def _kept(walk: Walk, folder: Path) -> Meta | None:
    """The index in `folder` if it is that of the source as it is now. Times of files are brought up to date."""
    try:
        index = open_index(folder, walk.source, walk.name, walk.seed, walk.processor)
        records = build_source(walk.source, walk.name, walk.seed, places=index.places)
        check_files(index, records)
    except ConfigError:
        return None
    now = zip(index.meta.files, states_of(records.files), strict=True)
    meta = replace(index.meta, files=tuple(replace(old, modified=new.modified) for old, new in now))
    if meta != index.meta:
        meta.write(folder)
    return meta


def _run(tasks: Sequence[Task], workers: int, report: Report) -> None:
    """Do the `tasks` whose last argument, the file that they write, does not exist."""
    if not tasks:  # of a source without JSON files, whose places need not be found
        return
    whole = sum(size for _, _, size in tasks)
    left = [task for task in tasks if not task[1][-1].exists()]
    done = whole - sum(size for _, _, size in left)
    report(done, whole)
    for size in _each(left, workers) if min(workers, len(left)) > 1 else map(_do, left):
        done += size
        report(done, whole)


def _do(task: Task) -> int:
    function, arguments, size = task
    function(*arguments)
    return size


def _each(tasks: Sequence[Task], workers: int) -> Iterator[int]:
    """The size of each task, once one of the `workers` processes has done it."""
    # Not forked: the libraries that read tables have threads.
    pool = ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn"), _begin, (os.getpid(),))
    try:
        for future in as_completed([pool.submit(_do, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool:
        fix = f"workers={max(1, workers // 2)}; what was done is kept"
        raise problem("workers", f"{workers}, of which one was killed", "memory for all of them", fix) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends them
    die_with_parent(parent)


def _publish(joined: Path, folder: Path) -> None:
    """Put the complete index `joined` in the place of `folder`."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(old)
    joined.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
