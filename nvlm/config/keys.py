"""Suggestions for dotted configuration keys that do not exist."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

# Keys of earlier versions, including all keys below them, and their replacements.
_MOVED = {"llm.seq_length": "data.seq_length", "llm.cross_length": "data.cross_length", "llm.steps": "train.steps"}


def moved(key: str) -> str | None:
    """The replacement of `key`, if an earlier version had it."""
    return next((new for old, new in _MOVED.items() if f"{key}.".startswith(f"{old}.")), None)


def near_keys(key: str, known: Sequence[str]) -> list[str]:
    """The keys in `known` that may have been meant: in the same section, or of the same name in another section."""
    if (new := moved(key)) in known:
        return [new]
    section, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    if section and siblings:
        close = get_close_matches(leaf, siblings, n=3, cutoff=0.6) or list(siblings)[:20]
        return [siblings[name] for name in close]
    namesakes = [name for name in known if name.rpartition(".")[2] == leaf]
    return get_close_matches(key, namesakes or known, n=3, cutoff=0.75) or namesakes
