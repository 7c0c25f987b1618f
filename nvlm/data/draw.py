"""What is drawn for a record: a function of the seed and the record's name. Imports no torch."""

from __future__ import annotations

import hashlib


def drawn(seed: int, name: str, what: str, count: int) -> int:
    """A number below `count` that depends only on the arguments, on any machine."""
    told = "\0".join((str(seed), name, what)).encode(errors="backslashreplace")
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest()) % count


def happens(seed: int, name: str, what: str, share: float) -> bool:
    """True for a `share` of the names."""
    return drawn(seed, name, what, 1 << 32) < share * (1 << 32)
