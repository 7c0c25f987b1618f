"""Files in object storage, named by a URL: s3://, gs://, or any scheme that fsspec knows. Imports no torch.

Only settings such as data.path name URLs. What a record says is never one: a path in it is looked up below the folder
of its images. Credentials come from the environment or the storage's own files; a URL that holds some is refused.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from nvlm.config.values import problem

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from pyarrow.fs import FileInfo, FileSystem

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://([^/]*)/?(.*)", re.DOTALL)
_SECRET = re.compile(r"://[^/]*:[^/]*@|\?.*=", re.DOTALL)
_NATIVE = ("s3", "gs")  # read by pyarrow itself, the others by fsspec
_BUFFER = 1 << 16  # bytes


@dataclass(frozen=True, slots=True)
class Status:
    """Size in bytes and time of change, named as in os.stat_result."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, slots=True, order=True)
class Remote:
    """A file or folder by its URL, with those methods of a Path that reading needs. They raise OSError."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str | PurePosixPath) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        """The folder that holds it."""
        return Remote(self.url.rstrip("/").rpartition("/")[0])

    def resolve(self) -> Remote:
        """Itself: there are no links."""
        return self

    def with_suffix(self, suffix: str) -> Remote:
        """The URL with another suffix."""
        return self.parent / PurePosixPath(self.name).with_suffix(suffix).name

    def stat(self) -> Status:
        """Size and time, without reading."""
        info = self._info()
        if info.type.name == "NotFound":
            raise FileNotFoundError(self.url)
        return Status(info.size or 0, info.mtime_ns or 0)

    def is_file(self) -> bool:
        """Whether it is there and no folder."""
        return self._info().type.name == "File"

    def is_dir(self) -> bool:
        """Whether files begin with this name and a slash."""
        return self._info().type.name == "Directory"

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The file for reading; only the ranges that are used are fetched."""
        return io.BufferedReader(self.native(), _BUFFER)

    def native(self) -> NativeFile:
        """The file for reading at any place, without a buffer."""
        files, path = self._at()
        return files.open_input_file(path)

    def read_bytes(self) -> bytes:
        """The whole content."""
        with self.native() as file:
            return file.read()

    def below(self) -> list[Remote]:
        """All files below this folder, sorted."""
        from pyarrow.fs import FileSelector

        files, path = self._at()
        found = files.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
        names = [one.path[len(path) :].lstrip("/") for one in found if one.type.name == "File"]
        return sorted(self / name for name in names)

    def _info(self) -> FileInfo:
        files, path = self._at()
        return files.get_file_info(path)

    def _at(self) -> tuple[FileSystem, str]:
        scheme, host, path = _URL.fullmatch(self.url).groups()
        files, base = _filesystem(scheme, host, os.getpid())
        return files, posixpath.join(base, path).rstrip("/")


@lru_cache(maxsize=8)
def _filesystem(scheme: str, host: str, process: int) -> tuple[FileSystem, str]:
    """The file system of a bucket and its path there. A forked process needs a connection of its own."""
    from pyarrow.fs import FileSystem

    try:
        return FileSystem.from_uri(f"{'' if scheme in _NATIVE else 'fsspec+'}{scheme}://{host}")
    except (ImportError, ValueError) as error:
        raise OSError(f"{scheme}:// cannot be read: {error}") from None


def place(path: str, key: str) -> Path | Remote:
    """What `path` names, a local file or one in object storage. Raises ConfigError for a URL with credentials, and for
    one of a local file, whose links nobody would check."""
    found = _URL.fullmatch(path)
    if not found:
        return Path(path)
    if found[1] in ("file", "local"):
        raise problem(key, path, "a path", f"{key}={path.partition('://')[2]}")
    if _SECRET.search(path):
        expected = "a URL without credentials, which belong into the environment (AWS_ACCESS_KEY_ID and others)"
        raise problem(key, "a URL with credentials or settings", expected, f"{key}=s3://BUCKET/PATH")
    return Remote(path)


def is_remote(path: str) -> bool:
    """Whether `path` is a URL."""
    return bool(_URL.fullmatch(path))


def matching(pattern: Remote) -> list[Remote]:
    """The files whose URLs match `pattern`, sorted. As on a disk, * does not match a slash, ** matches folders, and
    neither matches hidden names."""
    parts = pattern.url.split("/")
    fixed = next(number for number, part in enumerate(parts) if set("*?[") & set(part))
    base = Remote("/".join(parts[:fixed]))
    return [file for file in base.below() if _matches(file.url.split("/")[fixed:], parts[fixed:])]


def _matches(names: list[str], patterns: list[str]) -> bool:
    if not patterns or not names:
        return not patterns and not names
    hidden = names[0].startswith(".") and not patterns[0].startswith(".")
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or (not hidden and _matches(names[1:], patterns))
    return not hidden and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def spans(path: Path | Remote, opened: Callable[[Any], Any]) -> Callable[[int, int], bytes]:
    """A function that reads (start, size in bytes) of a file: one request, or one system call. `opened` opens it."""
    if isinstance(path, Remote):
        remote = path.native()
        return lambda start, size: remote.read_at(size, start)
    file = opened(path)
    return lambda start, size: os.pread(file.fileno(), size, start)
