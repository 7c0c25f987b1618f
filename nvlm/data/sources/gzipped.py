"""Gzip files. They are read from their start to look at first records, and unpacked once into a cache to read any.

The cache is $XDG_CACHE_HOME/nvlm, by default ~/.cache/nvlm. The name of an unpacked file is a digest of the path, size
and time of its gzip file, so that a changed file is unpacked again. Imports no torch.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from nvlm.config.values import ConfigError, problem
from nvlm.data.images import open_regular

_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20  # bytes


@contextmanager
def readable(path: Path, key: str) -> Iterator[BinaryIO]:
    """`path` opened for reading, unpacked if it is a gzip file. `key`: the setting that names it.

    Raises OSError for anything but a regular file, and ConfigError for a damaged gzip file, even within the block.
    """
    with open_regular(path) as file:
        if not _is_gzip(file):
            yield file
            return
        try:
            with gzip.GzipFile(fileobj=file) as plain:
                yield plain
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise problem(
                key, f"{path}, a damaged gzip file ({error})", "a whole gzip file", "write it again"
            ) from None


def plain_file(path: Path, key: str) -> Path:
    """`path`, or if it is a gzip file, what it holds as a file in the cache. Raises OSError and ConfigError."""
    with open_regular(path) as file:
        if not _is_gzip(file):
            return path
        status = os.fstat(file.fileno())
    told = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    target = cache_folder() / hashlib.sha256(os.fsencode(told)).hexdigest()[:32]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.parent):  # or every process of a node would unpack the file
            if not target.exists():
                _unpack(path, target, key)
    except OSError as error:
        got = f"{path}, which cannot be unpacked into {target.parent} ({error.strerror or error})"
        raise problem(key, got, "room for the unpacked file", f"unpack it: gunzip {path}") from None
    return target


def cache_folder() -> Path:
    """The folder of unpacked files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nvlm"


def _is_gzip(file: BufferedReader) -> bool:
    return file.peek(len(_MAGIC)).startswith(_MAGIC)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w") as lock:
        with suppress(OSError):  # some network file systems have no locks; then the file is unpacked several times
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unpack(path: Path, target: Path, key: str) -> None:
    """Write the content of `path` to `target`, which appears only when it is whole."""
    aside = target.with_name(f".{target.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with readable(path, key) as plain, open(aside, "wb") as file:
            shutil.copyfileobj(plain, file, _CHUNK)
        os.replace(aside, target)
    except (OSError, ConfigError):
        aside.unlink(missing_ok=True)
        raise
