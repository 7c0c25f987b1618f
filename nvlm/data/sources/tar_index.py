"""Where the samples of a tar file begin: energon's index, X.tar.idx beside X.tar, or the same index built once.

The index is N + 1 little-endian uint64: the offset of the first header of each of N samples, and the end of the last. A
sample is a run of members with the same key, as in WebDataset. Only headers are read to build it. Imports no torch.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nvlm.config.values import ConfigError, problem
from nvlm.data.images import open_regular
from nvlm.data.record import printable
from nvlm.data.remote import Remote
from nvlm.data.sources.cached import cached, make_once

BLOCK = 512  # bytes: all offsets are multiples of it
_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)")  # key and part name: up to, and after, the base name's first dot
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own members
_HEADER = 1 << 14  # bytes: no extended header is longer, or tarfile would take seconds for some of them
_HEADERS = 1 << 17  # bytes of all headers of a member: long names, extended headers, the map of a file with holes


def split_name(name: str) -> tuple[str, str] | None:
    """(key of the sample, name of the part, in lower case); None if the member belongs to no sample."""
    found = None if _META.match(name) else _NAME.fullmatch(name)
    return (found[1], found[2].lower()) if found else None


def opened_tar(file: BinaryIO) -> tarfile.TarFile:
    """The tar in `file`, from its present position on. Raises tarfile.TarError, also below."""
    return tarfile.open(fileobj=_Headers(file), mode="r:")


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar without its directories. Raises tarfile.TarError where one is damaged or cut short."""
    last = -1
    while (one := tar.next()) is not None:
        if one.size < 0 or one.offset <= last:
            raise tarfile.ReadError(f"a size below 0 at byte {one.offset}")
        tar.members.clear()  # which would hold all headers
        last = one.offset
        if not one.isdir():
            yield one
    check_end(tar.fileobj, tar.offset)


def check_end(file: BinaryIO, offset: int) -> None:
    """Raise tarfile.ReadError unless a tar ends at `offset`: with zeros, or with the file itself."""
    file.seek(offset)
    if file.read(BLOCK).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {offset}")


class _Headers:
    """A file from which no more is read at one place than a header takes, whatever it says of its length."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.tell = file, file.tell
        self.left = _HEADERS

    def seek(self, offset: int) -> int:
        """Go to `offset`, as tarfile does before each member."""
        self.left = _HEADERS
        return self.file.seek(offset)

    def read(self, size: int) -> bytes:
        """The next `size` bytes."""
        self.left -= size
        if not 0 <= size <= _HEADER or self.left < 0:
            raise tarfile.ReadError(f"a header of {size} bytes" if self.left >= 0 else "a header that is too long")
        return self.file.read(size)


def offsets_of(path: Path | Remote, key: str) -> np.ndarray:
    """The index of the tar file `path` [N + 1], int64: read if there is one that fits, else built and kept.

    `key`: the setting that named the file. Raises ConfigError if the tar is damaged, or its index is that of another.
    """
    with _open(path, key) as file:
        status, beside = path.stat(), index_path(path)
        here = [beside] if isinstance(beside, Path) or beside.is_file() else []  # nothing is written to object storage
        for index in (*here, cached(path, status, ".tar.idx")):
            with suppress(OSError):  # a folder that cannot be written
                make_once(index, lambda target: target.write(_scanned(file, path, key).astype("<u8").tobytes()))
                return _checked(index, file, status.st_size, path, key)
        return _scanned(file, path, key)


def index_path(path: Path | Remote) -> Path | Remote:
    """Where energon keeps the index of a tar file."""
    return path.with_suffix(".tar.idx")


def _scanned(file: BinaryIO, path: Path | Remote, key: str) -> np.ndarray:
    offsets, last = [], None
    try:
        file.seek(0)
        with opened_tar(file) as tar:
            for one in members(tar):
                name = split_name(one.name)
                if name and name[0] != last:
                    offsets.append(one.offset)
                    last = name[0]
            return np.array([*offsets, tar.offset], dtype=np.int64)
    except Exception as error:  # tarfile raises many types for damaged headers
        got = f"{path}, damaged or cut short after {len(offsets)} samples ({printable(str(error))})"
        raise problem(key, got, "a whole tar file", "copy or write it again") from None


def _checked(index: Path | Remote, file: BinaryIO, size: int, path: Path | Remote, key: str) -> np.ndarray:
    with open_regular(index) as opened:
        data = opened.read(min(index.stat().st_size, 8 * (size // BLOCK + 2)))  # no more samples fit the tar
    offsets = np.frombuffer(data[: len(data) // 8 * 8], dtype="<u8")
    found = offsets.astype(np.int64)
    if len(data) == 8 * len(found) and len(found) and offsets.max() > size:
        got = f"{path} with {size} bytes, less than the {offsets.max()} in {index.name}: cut short, or another tar"
        raise problem(key, got, "the tar of its index", f"copy the tar again, or remove the index: rm {index}")
    try:
        _check(len(data), found, file)
    except (tarfile.TarError, ValueError, IndexError) as error:
        got = f"{path} with an index that is not its own ({printable(str(error))})"
        raise problem(key, got, "the index of this tar", f"rm {index}, and it is built again") from None
    return found


def _check(size: int, found: np.ndarray, file: BinaryIO) -> None:
    """Raise tarfile.TarError or ValueError unless the index of `size` bytes is one, with headers at its first, middle
    and last sample and nothing after its end."""
    if size != 8 * len(found) or not len(found):
        raise ValueError(f"{size} bytes")
    if found[0] < 0 or (found % BLOCK).any() or (np.diff(found) <= 0).any():
        raise ValueError("offsets that do not increase by whole blocks")
    samples = found[:-1]
    for offset in samples[np.unique(np.linspace(0, len(samples) - 1, 3).astype(int))] if len(samples) else ():
        file.seek(int(offset))
        tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
    check_end(file, int(found[-1]))


def _open(path: Path | Remote, key: str) -> BinaryIO:
    expected, fix = "a tar file", f"{key}=FILE.tar"
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise problem(key, f"{printable(repr(str(path)))}: {printable(str(reason))}", expected, fix) from None
    start = file.read(BLOCK)
    if wrong := _wrong(start):
        file.close()
        raise _of_another_kind(path, key, wrong)
    return file


def _wrong(start: bytes) -> str | None:
    """Why a file that begins with these bytes is no tar file."""
    if not start:
        return "which is empty"
    if start.startswith(b"\x1f\x8b"):
        return "a gzip file"
    if not start.strip(b"\0"):
        return None  # a tar without members
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return "which is of another kind, or damaged at its start"
    return None


def _of_another_kind(path: Path | Remote, key: str, wrong: str) -> ConfigError:
    fix = f"unpack it: gunzip {path}" if "gzip" in wrong else f"{key}=FILE.tar"
    return problem(key, f"{path}, {wrong}", "a tar file that is not compressed", fix)
