"""Gzip files. They are read from their start to look at first records, and unpacked once into the cache to read any.
Imports no torch."""

from __future__ import annotations

import gzip
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from nvlm.config.values import problem
from nvlm.data.images import open_regular
from nvlm.data.remote import Remote
from nvlm.data.sources.cached import cached, make_once

_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20  # bytes


@contextmanager
def readable(path: Path | Remote, key: str) -> Iterator[BinaryIO]:
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


def plain_file(path: Path | Remote, key: str) -> Path:
    """`path`, or if it is a gzip file or in object storage, its plain content as a file in the cache.

    Raises OSError and ConfigError.
    """
    if isinstance(path, Path):
        with open_regular(path) as file:
            if not _is_gzip(file):
                return path
    target = cached(path, path.stat())

    def unpack(file: BinaryIO) -> None:
        with readable(path, key) as plain:
            shutil.copyfileobj(plain, file, _CHUNK)

    try:
        make_once(target, unpack)
    except OSError as error:
        got = f"{path}, which cannot be unpacked into {target.parent} ({error.strerror or error})"
        by_hand = f"unpack it: gunzip {path}, or " if isinstance(path, Path) else ""
        fix = f"{by_hand}export XDG_CACHE_HOME=DIR, another folder with room"
        raise problem(key, got, "a folder for the plain file", fix) from None
    return target


def _is_gzip(file: BufferedReader) -> bool:
    return file.peek(len(_MAGIC)).startswith(_MAGIC)
