"""Files that are made once from a source's files: $XDG_CACHE_HOME/nvlm, by default ~/.cache/nvlm. Imports no torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from nvlm.data.remote import Remote, Status


def cache_folder() -> Path:
    """The folder of cached files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nvlm"


def cached(path: Path | Remote, status: os.stat_result | Status, suffix: str = "") -> Path:
    """Where the cache holds what is made from `path`: another place if its path, size or time changes."""
    told = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return cache_folder() / (hashlib.sha256(os.fsencode(told)).hexdigest()[:32] + suffix)


def make_once(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` write the file `target`, which appears only when it is whole, unless it is there. Raises OSError.

    Of several processes of a node, one makes it and the others wait.
    """
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone():
        if target.exists():
            return
        aside = target.with_name(f".{target.name}.{os.uname().nodename}.{os.getpid()}")
        try:
            with open(aside, "wb") as file:
                write(file)
            os.replace(aside, target)
        except BaseException:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise


@contextmanager
def _alone() -> Iterator[None]:
    """Without a cache folder that can be written, or on a network file system without locks, a file may be made several
    times."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        lock = open(cache_folder() / "lock", "w")
    except OSError:
        yield
        return
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
