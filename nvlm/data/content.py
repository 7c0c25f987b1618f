"""Digests of large files by a sample of their bytes, which takes seconds at 100 GB. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from nvlm.data.remote import Remote

_MOST = 1 << 32  # bytes that are read of all files of a source
_WHOLE = 1 << 26  # bytes: files up to this size are read completely
_BLOCK = 1 << 16  # bytes
_BLOCKS = 64  # in a larger file, evenly spaced, including the first and the last


def content_digest(path: Path | Remote, files: int = 1) -> str:
    """SHA-256 of a file's bytes, sampled if it is larger than 64 MiB or in object storage: a change that keeps its size
    and lies between two samples goes undetected. `files`: how many the source has; of each of many, less is read."""
    size, remote, share = path.stat().st_size, isinstance(path, Remote), _MOST // max(1, files)
    with path.open("rb") as file:
        if size <= min(_WHOLE, share) and not remote:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return _sampled(file, size, 2 if remote else max(2, min(_BLOCKS, share // _BLOCK))).hexdigest()


def _sampled(file: BinaryIO, size: int, blocks: int):
    found = hashlib.sha256()
    for number in range(blocks):
        file.seek(number * max(0, size - _BLOCK) // (blocks - 1))
        found.update(file.read(_BLOCK))
    return found
