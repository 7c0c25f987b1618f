"""Quotes the words of a command line, `key=value`, for Hydra.

Hydra's grammar trips over é, ~, # and quotes, reads name=20241127 as a number, and takes a comma for a sweep. Values
that can only be text are quoted here, so that users need not do it.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from nvlm.config.mapping import leaves
from nvlm.config.values import Config, problem

SWEEP_FLAGS = ("-m", "--multirun")
_KEY = re.compile(r"[+~]{0,2}[\w./@-]+", re.ASCII)


def plain_words(arguments: Sequence[str]) -> list[str]:
    """`arguments`, with text values quoted where Hydra would read something else."""
    sweep = any(word in SWEEP_FLAGS for word in arguments)
    return [word if word.startswith("-") else _plain(word, sweep) for word in arguments]


def own_words(arguments: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The values of a command's own `keys`, verbatim, and the other words. Hydra would parse special characters in a
    prompt. Raises ConfigError for a word without a value."""
    own, others = {}, []
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals:
            raise problem("command line", repr(word), "key=value", "--help lists the keys")
        if key in keys:
            own[key] = value
        else:
            others.append(word)
    return own, others


def parse(word: str) -> Override:
    """Parse one word with Hydra's parser. Raises ConfigError."""
    try:
        read = _parser().parse_overrides([word])[0]
    except HydraException:
        read = None
    if read is None or not read.key_or_group:
        fix = "--help lists the keys; a value with spaces needs quotes: 'key=my value'"
        raise problem("command line", repr(word), "key=value", fix)
    if read.is_delete():
        raise problem("command line", repr(word), "a value for every key", f"omit {word}")
    return read


def _plain(word: str, sweep: bool) -> str:
    key, equals, value = word.partition("=")
    if not equals or not _KEY.fullmatch(key):
        return word
    if key.startswith("hydra.") and value.startswith("~"):  # shells do not expand the ~ in key=~/folder
        return _plain(f"{key}={os.path.expanduser(value)}", sweep) if os.path.expanduser(value) != value else word
    try:
        (read,) = _parser().parse_overrides([word])
    except HydraException:
        parts = value.split(",") if sweep else [value]
        return f"{key}={','.join(map(quoted, parts))}"
    listed = read.is_sweep_override()
    is_text = (not sweep) if listed else isinstance(read.value(), int | float)  # including true and false
    return f"{key}={quoted(value)}" if is_text and _is_text(key) else word


def quoted(value: str) -> str:
    """`value` as Hydra's quoted string."""
    return QuotedString(value, Quote.double).with_quotes()


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _is_text(key: str) -> bool:
    return _texts(Config).fullmatch(key) is not None


@functools.cache
def _texts(cls: type) -> re.Pattern[str]:
    """Matches the keys of `cls` that hold text, whatever the names of a mapping and the numbers of a list."""
    kinds = [(key, kind.type) for key, kind in leaves(cls)]
    others = {key for key, kind in kinds if kind is not str}
    texts = [re.escape(key).replace(r"\*", r"[^.]+") for key, _ in kinds if key not in others]
    return re.compile("|".join(texts))
