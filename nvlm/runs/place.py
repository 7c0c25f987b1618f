"""Where runs go: folder names for the runs of a sweep, and whether a folder can be created. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from nvlm.config.values import problem

_LONGEST = 200  # bytes of a folder's name; file systems allow 255


def sweep_folder(overrides: str) -> str:
    """A folder name for `overrides`, such as "arch=xattn,seed=2": the same text if that is a good name.

    Otherwise slashes, quotes and spaces are replaced, a long name is cut, and a digest keeps names distinct. The marks
    + and ++ in front of keys are left out, and True and False become true and false, so that a run has one name whether
    Hydra or this package writes its overrides.
    """
    overrides = re.sub(r"(^|,)\+{1,2}(?=[^,=]+=)", r"\1", overrides)
    overrides = re.sub(r"=(True|False)(?=,|$)", lambda match: match[0].lower(), overrides)
    name = re.sub(r"[/\\\"'\s\0]+", "_", overrides).lstrip(".") or "default"
    if name == overrides and len(os.fsencode(name)) <= _LONGEST:
        return name
    if not overrides:
        return name
    digest = hashlib.sha256(os.fsencode(overrides)).hexdigest()[:10]
    short = os.fsencode(name)[: _LONGEST - len(digest) - 1]
    return f"{short.decode(errors='ignore')}-{digest}"


def split_paths(text: str, exists: Callable[[str], object]) -> list[str]:
    """The paths in a list with commas. Names of runs contain commas too, so the longest piece that exists counts."""
    parts, paths = text.split(","), []
    while parts:
        lengths = (n for n in range(len(parts), 0, -1) if exists(",".join(parts[:n])))
        taken = next(lengths, 1)
        paths.append(",".join(parts[:taken]))
        parts = parts[taken:]
    return [path for path in paths if path]


def check_place(folder: Path, key: str) -> None:
    """Raise ConfigError if `folder`, which `key` names, does not exist and cannot be created. Creates nothing."""
    nearest = folder if os.path.isabs(folder) else Path.cwd() / folder
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if nearest.is_symlink() and not nearest.exists():
        got = f"a link to {os.readlink(nearest)}, which does not exist"
    elif not nearest.is_dir():
        got = "a file"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        got = "a folder that this user may not write"
    else:
        return
    if key == "out":
        raise problem(f"out={folder}", f"{nearest}, {got}", "a folder that can be written", "out=DIR")
    fix = "name=OTHER" if nearest.name == folder.name else f"{key}=DIR, or another working directory"
    raise problem(f"run folder {folder}", f"{nearest}, {got}", "a folder that can be written", fix)
