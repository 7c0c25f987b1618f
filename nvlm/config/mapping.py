"""Dataclasses from plain values, such as Hydra's composed dictionary or a run's config.yaml.

Every value is held to its field's type and limits (nvlm.config.fields); a mistake is answered in one line. Imports no
torch, so that it is answered in under half a second.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import typing
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated

from nvlm.config.fields import FilePath
from nvlm.config.keys import moved
from nvlm.config.values import problem


def from_mapping(cls: type, values: dict, path: str = ""):
    """Build the dataclass `cls` from plain `values`. Raises ConfigError for a key that is unknown or missing, and for a
    value that is not of its field's type or beyond the field's limits."""
    kinds = kinds_of(cls)
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        if new := moved(f"{path}{unknown[0]}"):
            raise problem(f"{path}{unknown[0]}", "a key of an earlier version", new, f"{new}=...")
        near = get_close_matches(unknown[0], kinds, n=3, cutoff=0.7)
        fix = f"{path}{near[0]}=..." if near else "leave it out"
        expected = f"one of {', '.join(near or sorted(kinds))}"
        raise problem(f"{path}{unknown[0]}", "a key that does not exist", expected, fix)
    missing = sorted(set(kinds) - set(values))
    if missing:
        raise problem(f"{path}{missing[0]}", "nothing", str(kinds[missing[0]]), f"{path}{missing[0]}=...")
    return cls(**{key: _checked(kind, values[key], f"{path}{key}") for key, kind in kinds.items()})


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field may hold: a `type`, for containers the kinds `inside`, the `limits` of its annotation, or None."""

    type: type
    inside: tuple[Kind, ...]
    limits: tuple
    optional: bool

    def __str__(self) -> str:
        limits = ", ".join(map(str, self.limits))
        if self.type is str and limits:
            return limits
        return ", ".join(filter(None, (_KINDS.get(self.type, "a group of keys"), limits)))


@functools.cache
def kinds_of(cls: type) -> dict[str, Kind]:
    """The fields of a dataclass."""
    return {name: _kind(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}


def _kind(hint) -> Kind:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    some = next(option for option in options if option is not types.NoneType)
    limits = some.__metadata__ if typing.get_origin(some) is Annotated else ()
    bare = typing.get_args(some)[0] if limits else some
    inside = tuple(_kind(part) for part in typing.get_args(bare) if part is not ...)
    return Kind(typing.get_origin(bare) or bare, inside, limits, len(options) > 1)


_LARGEST = 2**62  # in 64 bits, with room to count on
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    tuple: "a list",
}
_EXAMPLES = {int: "1", float: "1", bool: "true", str: "'\"text\"'", dict: "{name:1}", tuple: "[a,b]"}


def _checked(kind: Kind, value, path: str, fix: str = "{}={}"):
    if value is None and kind.optional:
        return None
    if dataclasses.is_dataclass(kind.type):
        if not isinstance(value, dict):
            raise problem(path, repr(value), str(kind), f"{path}.KEY=...")
        return from_mapping(kind.type, value, f"{path}.")
    value = _as_type(kind.type, value, path)
    if kind.type is dict:
        return {key: _checked(kind.inside[1], item, f"{path}.{key}") for key, item in value.items()}
    if kind.type is tuple:
        return tuple(_checked(kind.inside[0], item, path, "{}=[{}]") for item in value)
    for limit in kind.limits:
        if value not in limit:
            got = repr(value) if kind.type is str else value
            raise problem(path, got, str(limit), fix.format(path, limit.instead(value)))
        if isinstance(limit, FilePath):  # a shell leaves the ~ of key=~/file alone
            value = os.path.expanduser(value)
    return value


def _as_type(wanted: type, value, path: str):
    """`value` as a `wanted`, where it can be read as nothing else."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if wanted is str and whole:  # name: 20241127
        return str(value)
    if wanted is float and (whole or isinstance(value, str)):  # YAML reads 1e-4 as text
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if wanted is tuple and isinstance(value, list):
        return tuple(value)
    if wanted is int and whole and abs(value) > _LARGEST:
        raise problem(path, value, f"a number of at most {len(str(_LARGEST)) - 1} digits", f"{path}=1")
    if not isinstance(value, wanted) or (wanted is int and not whole):
        example = f"[{value.strip('[]')}]" if wanted is tuple and isinstance(value, str) else _EXAMPLES[wanted]
        raise problem(path, repr(value), _KINDS[wanted], f"{path}={example}")
    return value
