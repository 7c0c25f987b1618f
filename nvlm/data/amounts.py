"""Amounts of work in a sample, a row or a step, which can be added. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Addable:
    """Values that are added field by field."""

    def __add__(self, other):
        return type(self)(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(Addable):
    """Amounts of work in a sample, a row or a step, without padding."""

    tokens: int = 0  # of the text stream, including tile tokens
    pairs: int = 0  # (token, visible token) in self-attention: s (s + 1) / 2 for a sample of s tokens
    outputs: int = 0  # positions with a label; only they go through the output layer
    tiles: int = 0  # encoded
    projected: int = 0  # tile tokens that go through the projector, to the stream or to the keys
    keys: int = 0  # cross-attended tokens
    cross_pairs: int = 0  # (token, visible key)
