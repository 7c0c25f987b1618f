"""Dataclasses from plain values, such as Hydra's composed dictionary or a run's config.yaml.

Every value is checked against its field's type and limits (nvlm.config.fields); a mistake gives a one-line error.
Imports no torch, so that the error appears in under half a second.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated

from nvlm.config.fields import Choice, FilePath, Range, Tag
from nvlm.config.keys import moved
from nvlm.config.values import ConfigError, problem


def from_mapping(cls: type, values: dict, path: str = ""):
    """Build the dataclass `cls` from plain `values`; `path` is their key prefix, with a trailing dot.

    The Tag of a union of dataclasses selects one of them. If the field has the same name as the tag, the selected
    dataclass takes its keys from `values` itself: {source: jsonl, path: ...}. Raises ConfigError for an unknown or
    missing key, and for a value of the wrong type or outside the field's limits.
    """
    kinds = kinds_of(cls)
    beside = {name: _chosen(kind, values, path) for name, kind in kinds.items() if kind.tag == name}
    everything = kinds | {key: kind for variant in beside.values() for key, kind in kinds_of(variant).items()}
    unknown = sorted(set(values) - set(everything), key=str)
    if unknown:
        raise _unknown(path, unknown[0], list(everything))
    defaults = {key: value for one in (cls, *beside.values()) for key, value in _defaults(one).items()}
    values = {**defaults, **values}
    missing = sorted(set(everything) - set(values))
    if missing:
        raise problem(f"{path}{missing[0]}", "nothing", str(everything[missing[0]]), _typed(f"{path}{missing[0]}"))
    parts = {
        name: from_mapping(variant, {key: values[key] for key in kinds_of(variant)}, path)
        for name, variant in beside.items()
    }
    others = {key: _checked(kind, values[key], f"{path}{key}") for key, kind in kinds.items() if key not in beside}
    return cls(**parts, **others)


def to_mapping(value) -> dict:
    """The plain values of a dataclass; the inverse of `from_mapping`."""
    plain: dict = {}
    for name, kind in kinds_of(type(value)).items():
        part = _plain(getattr(value, name))
        plain |= part if kind.tag == name else {name: part}
    return plain


def _plain(value):
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, list | tuple) else value


def leaves(cls: type, path: str = "") -> Iterator[tuple[str, Kind]]:
    """The dotted key and the kind of every value in `cls`, including all variants; * replaces keys of a mapping and
    indices of a list."""
    for name, kind in kinds_of(cls).items():
        yield from _leaves(kind, path.removesuffix(".") if kind.tag == name else f"{path}{name}")


def _leaves(kind: Kind, path: str) -> Iterator[tuple[str, Kind]]:
    for variant in kind.variants:
        yield from leaves(variant, f"{path}.")
    if kind.inside and kind.inside[-1].variants:
        yield from _leaves(kind.inside[-1], f"{path}.*")
    elif not kind.variants:
        yield path, kind


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field may hold: its `type`, the kinds `inside` a container, its `limits`, and whether None is allowed.

    `variants`: the dataclasses that it may be; if there are several, the key `tag` distinguishes them.
    """

    type: type
    inside: tuple[Kind, ...]
    limits: tuple
    optional: bool
    variants: tuple[type, ...] = ()
    tag: str | None = None

    def __str__(self) -> str:
        limits = ", ".join(map(str, self.limits))
        if self.type is str and limits:
            return limits
        return ", ".join(filter(None, (_KINDS.get(self.type, "a group of keys"), limits)))


@functools.cache
def _defaults(cls: type) -> dict[str, object]:
    """The fields of a dataclass that may be left out, with their values."""
    return {one.name: _plain(one.default) for one in dataclasses.fields(cls) if one.default is not dataclasses.MISSING}


@functools.cache
def kinds_of(cls: type) -> dict[str, Kind]:
    """The fields of a dataclass."""
    return {name: _kind(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}


def _kind(hint) -> Kind:
    limits = hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
    bare = typing.get_args(hint)[0] if limits else hint
    if typing.get_origin(bare) in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(bare) if option is not types.NoneType]
        optional = len(options) < len(typing.get_args(bare))
        if len(options) > 1:
            (tag,) = (limit.key for limit in limits if isinstance(limit, Tag))
            return Kind(dict, (), (Choice(*map(_name(tag), options)),), optional, tuple(options), tag)
        return dataclasses.replace(_kind(options[0]), optional=optional)
    inside = tuple(_kind(part) for part in typing.get_args(bare) if part is not ...)
    variants = (bare,) if dataclasses.is_dataclass(bare) else ()
    return Kind(typing.get_origin(bare) or bare, inside, limits, False, variants)


def _name(tag: str) -> Callable[[type], str]:
    """A function from a dataclass to the only word that its field `tag` allows."""
    return lambda variant: kinds_of(variant)[tag].limits[0].words[0]


def _chosen(kind: Kind, values: dict, path: str) -> type:
    """The dataclass of `kind` that the mapping `values` selects."""
    if kind.tag is None:
        return kind.variants[0]
    (names,) = kind.limits
    key, got = f"{path}{kind.tag}", values.get(kind.tag)
    if not isinstance(got, str) or got not in names:
        instead = names.instead(got if isinstance(got, str) else "")
        raise problem(key, "nothing" if got is None else repr(got), str(names), _typed(key, instead))
    return kind.variants[names.words.index(got)]


def _unknown(path: str, key: object, known: list[str]) -> ConfigError:
    if new := moved(f"{path}{key}"):
        return problem(f"{path}{key}", "a key of an earlier version", new, _typed(new))
    near = get_close_matches(str(key), known, n=3, cutoff=0.7)
    fix = _typed(f"{path}{near[0]}") if near else "leave it out"
    return problem(f"{path}{key}", "a key that does not exist", f"one of {', '.join(near or sorted(known))}", fix)


def _typed(path: str, value: str = "...") -> str:
    """The command-line word that sets `path`: for Hydra, data.blend[1].weight is data.blend.1.weight."""
    return f"{re.sub(r'\[(\d+)\]', r'.\1', path)}={value}"


_LARGEST = 2**62  # fits in 64 bits, with room for further counting
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    tuple: "a list",
    list: "a list",
}
_EXAMPLES = {int: "1", float: "1", bool: "true", str: "'\"text\"'", dict: "{name:1}", tuple: "[a,b]", list: "[a,b]"}


def _checked(kind: Kind, value, path: str, form: str = "{}"):
    """`value` at `path`, checked and converted to `kind`. `form`: how an item is typed on the command line."""
    if value is None and kind.optional:
        return None
    if kind.variants:
        if not isinstance(value, dict):
            raise problem(path, repr(value), "a group of keys", _typed(f"{path}.{kind.tag or 'KEY'}"))
        return from_mapping(_chosen(kind, value, f"{path}."), value, f"{path}.")
    value = _as_type(kind, value, path)
    if kind.type is dict:
        return {key: _checked(kind.inside[1], item, f"{path}.{key}") for key, item in value.items()}
    if kind.type in (list, tuple):
        (inside,) = kind.inside
        if inside.variants:
            return kind.type(_checked(inside, item, f"{path}[{place}]") for place, item in enumerate(value))
        return kind.type(_checked(inside, item, path, "[{}]") for item in value)
    for limit in kind.limits:
        if value not in limit:
            got = repr(value) if kind.type is str else value
            raise problem(path, got, str(limit), _typed(path, form.format(limit.instead(value))))
        if isinstance(limit, FilePath):  # shells do not expand the ~ in key=~/file
            value = os.path.expanduser(value)
    return value


def _as_type(kind: Kind, value, path: str):
    """`value` converted to the type of `kind`, if that is unambiguous."""
    wanted = kind.type
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
        raise problem(path, value, f"a number of at most {len(str(_LARGEST)) - 1} digits", _typed(path, "1"))
    if not isinstance(value, wanted) or (wanted is int and not whole):
        listed = wanted in (list, tuple) and isinstance(value, str)
        example = f"[{value.strip('[]')}]" if listed else _example(kind)
        path_of = next((limit.needed for limit in kind.limits if isinstance(limit, FilePath)), "")
        raise problem(path, repr(value), path_of or _KINDS[wanted], _typed(path, example))
    return value


def _example(kind: Kind) -> str:
    """A value that a field of this kind may hold."""
    for limit in kind.limits:
        if isinstance(limit, FilePath):
            return limit.example
        if isinstance(limit, Range):
            return limit.instead(1)
        if isinstance(limit, Choice):
            return limit.words[0]
    return _EXAMPLES[kind.type]
