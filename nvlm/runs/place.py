"""Where runs go: the folder of one run of a sweep, and whether a folder can be made at all. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from nvlm.config.values import problem

_LONGEST = 200  # bytes of a folder's name; file systems allow 255


def sweep_folder(overrides: str) -> str:
    """The name of one folder for `overrides`, such as "arch=xattn,seed=2": as it is where it can be one.

    What no folder's name can have (slashes) or should have (quotes) is replaced, what is too long is cut, and a digest
    of the whole keeps two of them apart.
    """
    name = re.sub(r"[/\\\"'\s\0]+", "_", overrides).lstrip(".") or "default"
    if name == overrides and len(os.fsencode(name)) <= _LONGEST:
        return name
    if not overrides:
        return name
    digest = hashlib.sha256(os.fsencode(overrides)).hexdigest()[:10]
    short = os.fsencode(name)[: _LONGEST - len(digest) - 1]
    return f"{short.decode(errors='ignore')}-{digest}"


def check_place(folder: Path, key: str) -> None:
    """Raise ConfigError where `folder`, which `key` names, is not there and cannot be made. Makes nothing."""
    there = folder if os.path.isabs(folder) else Path.cwd() / folder
    while not os.path.lexists(there):
        there = there.parent
    if there.is_symlink() and not there.exists():
        got = f"a link to {os.readlink(there)}, which is not there"
    elif not there.is_dir():
        got = "a file"
    elif not os.access(there, os.W_OK | os.X_OK):
        got = "a folder that this user may not write"
    else:
        return
    fix = "name=OTHER" if there.name == folder.name else f"{key}=DIR, or another working directory"
    raise problem(f"run folder {folder}", f"{there}, {got}", "a folder that can be written", fix)
