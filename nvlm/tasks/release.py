"""The forms in which benchmarks are published: which files there are, and how they are found. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvlm.config.values import ConfigError, problem
from nvlm.data.sources.rows import Row, Rows
from nvlm.tasks.asked import Asked

KEY = "data.path"  # the setting that names the folder
_SHORT = {"validation": "val"}
_POINTER = 1024  # bytes: Git LFS pointers are smaller
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One form in which a benchmark is published.

    `files`: for each kind of file, patterns below the benchmark's folder, in which {split} stands for the split and
    {short} for its short form, val; the first pattern with a match is used, and there must be files of each kind.
    `images`: patterns of the folder that has the images, if they are files. `rows`: opens the files, a list for each
    kind. `ask`: what a row asks; its arguments are the row, its name and the images' folder, resolved. It raises
    BadRecord.
    """

    files: tuple[tuple[str, ...], ...]
    rows: Callable[[Sequence[Sequence[Path]], str], Rows]
    ask: Callable[[Row, str, Path], Asked]
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A release in a folder: its files by kind, and the folder of its images, resolved."""

    release: Release
    files: tuple[tuple[Path, ...], ...]
    root: Path


def find(releases: Sequence[Release], task: str, folder: Path, split: str) -> Found:
    """The first of `releases` whose files are in `folder`. Raises ConfigError, also if some files are missing."""
    if not folder.is_dir():
        raise problem(KEY, f"{folder}, which is no folder", f"the folder of {task}'s files", f"{KEY}=FOLDER")
    for release in releases:
        files = tuple(_matching(folder, patterns, split) for patterns in release.files)
        if all(files):
            for kind in files:
                _check_parts(kind)
                _check_content(kind[0])
            return Found(release, files, _image_folder(release, task, folder, split))
    raise _nothing(releases, task, folder, split)


def is_there(releases: Sequence[Release], folder: Path, split: str) -> bool:
    """Whether files of `split` are in `folder`, in any of the releases."""
    return any(all(_matching(folder, patterns, split) for patterns in release.files) for release in releases)


def _matching(folder: Path, patterns: Sequence[str], split: str) -> tuple[Path, ...]:
    for pattern in patterns:
        files = sorted(path for path in folder.glob(_named(pattern, split)) if not path.name.startswith("."))
        if files:
            return tuple(files)
    return ()


def _image_folder(release: Release, task: str, folder: Path, split: str) -> Path:
    if not release.images:
        return folder.resolve()
    found = [path for path in _matching(folder, release.images, split) if path.is_dir()]
    if not found:
        expected = f"a folder of images there: {', '.join(_named(pattern, split) for pattern in release.images)}"
        raise problem(
            KEY, f"{folder}, with questions of {task} but without images", expected, "unpack the images there"
        )
    return found[0].resolve()


def _check_parts(files: Sequence[Path]) -> None:
    """Raise ConfigError if one of the numbered parts of a Parquet file is missing."""
    parts: dict[tuple, set[int]] = {}
    for path in files:
        if found := _PART.fullmatch(path.name):
            parts.setdefault((path.parent, found[1], int(found[3])), set()).add(int(found[2]))
    for (folder, name, count), numbers in parts.items():
        missing = sorted(set(range(count)) - numbers)
        if missing:
            got = f"{folder} without {name}-{missing[0]:05d}-of-{count:05d}, of which {len(missing)} parts are missing"
            raise problem(KEY, got, f"all {count} parts", "download the missing parts")


def _check_content(path: Path) -> None:
    """Raise ConfigError for what a `git clone` without Git LFS leaves in place of a large file."""
    if path.is_file() and path.stat().st_size < _POINTER and path.read_bytes().startswith(b"version https://git-lfs"):
        got = f"{path}, a Git LFS pointer in place of the file"
        raise problem(KEY, got, "the file itself", f"git -C {path.parent} lfs pull")


def _nothing(releases: Sequence[Release], task: str, folder: Path, split: str) -> ConfigError:
    forms = [" with ".join(_named(patterns[0], split) for patterns in release.files) for release in releases]
    expected = f"{' or '.join(forms)}, there or in a folder {task} there"
    return problem(KEY, f"{folder}, where no files of {task} were found", expected, f"{KEY}=FOLDER")


def _named(pattern: str, split: str) -> str:
    return pattern.replace("{split}", split).replace("{short}", _SHORT.get(split, split))
