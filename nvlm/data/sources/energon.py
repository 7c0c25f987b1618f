"""The tars of a folder that energon prepared: its .nv-meta/split.yaml says which are for training. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nvlm.config.values import problem
from nvlm.data.record import printable
from nvlm.data.remote import Remote, place
from nvlm.data.sources.files import files_of

_SPLITS = Path(".nv-meta") / "split.yaml"
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*))\}")
_MOST = 100_000  # files


def shards_of(path: str, suffixes: Sequence[str], key: str) -> list[Path | Remote]:
    """The tars that `path` names. Of a folder with splits: those of `train`, or of `val` if `key` is the setting of
    held-out records. Raises ConfigError."""
    folder = place(path, key)
    splits = folder / _SPLITS
    if not _is_file(splits, key):
        return files_of(path, suffixes, key)
    values = _read(splits, key)
    part = "val" if key.endswith("heldout_path") else "train"
    names, excluded = (_names(found) for found in (values["split_parts"].get(part, []), values.get("exclude") or []))
    if max(len(names), len(excluded)) > _MOST:
        raise problem(
            key, f"{splits} with more than {_MOST:,} names", "fewer", f"{key}='{path}/*.tar', which ignores it"
        )
    left_out = set(excluded)
    if single := [name for name in left_out if not name.endswith(tuple(suffixes))]:
        got = f"{splits} with single samples to exclude, such as {single[0]}"
        raise problem(key, got, "whole tars to exclude", f"{key}='{path}/*.tar', which ignores the splits")
    chosen = [name for name in names if name not in left_out]
    if not chosen or any(Path(name).is_absolute() or ".." in Path(name).parts for name in chosen):
        raise problem(key, f"{splits} with no tars of {part} in its folder", "names of tars", f"{key}='{path}/*.tar'")
    return [folder / name for name in chosen]


def _is_file(file: Path | Remote, key: str) -> bool:
    try:
        return file.is_file()
    except OSError as error:
        raise problem(key, f"{file}: {printable(str(error))}", "a URL that can be read", f"{key}=PATH") from None


def _read(file: Path | Remote, key: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(file.read_bytes())
        lists = [*values["split_parts"].values(), values.get("exclude") or []]
        if all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
            return values
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        pass
    got = f"{file}, which cannot be read"
    raise problem(key, got, "split_parts with lists of tars", f"{key}='{file.parent.parent}/*.tar', which ignores it")


def _names(patterns: Sequence[str]) -> list[str]:
    """The names of all patterns, or so many that they are too many."""
    return list(islice(chain.from_iterable(map(expanded, patterns)), _MOST + 1))


def expanded(pattern: str) -> Iterator[str]:
    """The names of a pattern with braces: a_{000..012}.tar, {a,b}.tar."""
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    first, last, words = found.groups()
    numbers = range(int(first), int(last) + 1) if first else ()
    for word in words.split(",") if first is None else (f"{number:0{len(first)}}" for number in numbers):
        yield from expanded(pattern[: found.start()] + word + pattern[found.end() :])
