"""Dotted keys of the configuration: which one was meant, where a key does not exist."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

# Keys of earlier versions, with all that begin with them, and what is typed in their place.
_MOVED = {"llm.seq_length": "data.seq_length", "llm.cross_length": "data.cross_length", "llm.steps": "train.steps"}


def moved(key: str) -> str | None:
    """What took the place of `key`, if an earlier version had it."""
    return next((new for old, new in _MOVED.items() if f"{key}.".startswith(f"{old}.")), None)


def near_keys(key: str, known: Sequence[str]) -> list[str]:
    """Those of `known` that `key` may have meant: of its own section, or of the same name in another one."""
    if (new := moved(key)) in known:
        return [new]
    section, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    if section and siblings:
        close = get_close_matches(leaf, siblings, n=3, cutoff=0.6) or list(siblings)[:20]
        return [siblings[name] for name in close]
    namesakes = [name for name in known if name.rpartition(".")[2] == leaf]
    return get_close_matches(key, namesakes or known, n=3, cutoff=0.75) or namesakes
