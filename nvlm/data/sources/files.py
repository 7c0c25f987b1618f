"""The files that a source's path names: one file, all files of a folder, or those that match a glob. No torch."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from nvlm.config.fields import named
from nvlm.config.values import ConfigError, problem
from nvlm.data import remote
from nvlm.data.images import open_regular
from nvlm.data.record import printable
from nvlm.data.remote import Remote, is_remote, place

_WILD = frozenset("*?[")


def files_of(path: str, suffixes: Sequence[str], key: str) -> list[Path | Remote]:
    """The files that `path` names, sorted by name; in a folder, those below it that end in one of `suffixes`, but not
    hidden ones, such as an editor's copies.

    A file is taken whatever its name is. `key`: the setting that holds `path`. Raises ConfigError if there is none.
    """
    if is_remote(path):
        return _remote(place(path, key), suffixes, key)
    if os.path.isdir(path):
        below = (file for file in Path(path).rglob("*") if file.name.endswith(tuple(suffixes)) and not file.is_dir())
        found = sorted(file for file in below if not _is_hidden(file.relative_to(path).parts))
        expected = f"a folder with {' or '.join(f'*{suffix}' for suffix in suffixes)}"
    elif is_glob(path):
        return matching(path, key)
    else:
        return [Path(path)]
    if not found:
        raise _none(path, key, expected)
    return found


def _remote(path: Remote, suffixes: Sequence[str], key: str) -> list[Path | Remote]:
    try:
        if is_glob(path.url):
            found, expected = remote.matching(path), "a glob that matches files"
        elif path.is_dir():
            base = f"{path.url.rstrip('/')}/"
            below = [file for file in path.below() if file.name.endswith(tuple(suffixes))]
            found = [file for file in below if not _is_hidden(file.url.removeprefix(base).split("/"))]
            expected = f"a folder with {' or '.join(f'*{suffix}' for suffix in suffixes)}"
        else:
            return [path]
    except OSError as error:
        raise problem(key, f"{path}: {printable(str(error))}", "a URL that can be read", f"{key}=PATH") from None
    if not found:
        raise _none(path.url, key, expected)
    return found


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def matching(pattern: str, key: str) -> list[Path]:
    """The files or folders that match `pattern`, sorted by name. Raises ConfigError if there is none."""
    found = sorted(map(Path, glob.glob(pattern, recursive=True)))
    if not found:
        raise _none(pattern, key, "a glob that matches files")
    return found


def _none(path: str, key: str, expected: str) -> ConfigError:
    return problem(key, f"{named(path)}, where there is none", expected, f"{key}=FILE")


def check_begins(path: Path | Remote, key: str, beginning: bytes, expected: str, fix: str) -> None:
    """Raise ConfigError unless `path`, which the setting `key` names, is a regular file with this `beginning`."""
    try:
        with open_regular(path) as file:
            found = file.read(len(beginning))
    except FileNotFoundError:
        raise problem(key, named(path), f"{expected} that exists", fix) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise problem(key, f"{printable(repr(str(path)))}: {printable(str(reason))}", expected, fix) from None
    if found != beginning:
        raise problem(key, f"{path}, which is {'of another kind' if found else 'empty'}", expected, fix)


def is_glob(path: str) -> bool:
    """Whether `path` is a pattern. A file whose name looks like one is a file."""
    return bool(_WILD & set(path)) and not os.path.exists(path)


def image_root(path: str, root: str | None, key: str) -> Path | Remote:
    """The folder that image paths are relative to and may not leave, resolved: `root`, or else the folder of `path`.

    The folder of a glob is the part of it before the first pattern. Raises ConfigError if `root` is no folder.
    """
    if root:
        setting = f"{key.rpartition('.')[0]}.root"
        found = place(root, setting)
        if isinstance(found, Path) and not found.is_dir():
            raise problem(setting, named(root), "a folder that exists", f"{setting}=DIR")
        return found.resolve()
    if is_remote(path):
        return _remote_root(place(path, key))
    if os.path.isdir(path):
        return Path(path).resolve()
    parts = Path(path).parts
    fixed = next((place for place, part in enumerate(parts) if is_glob(path) and _WILD & set(part)), len(parts) - 1)
    return Path(*parts[:fixed]).resolve()


def _remote_root(path: Remote) -> Remote:
    """The folder of a URL; one that does not end in a file's suffix is a folder itself."""
    parts = path.url.rstrip("/").split("/")
    end = next((number for number, part in enumerate(parts) if _WILD & set(part)), None)
    if end is None:
        end = len(parts) - 1 if "." in parts[-1] and len(parts) > 3 else len(parts)
    return Remote("/".join(parts[:end]))
