"""What a sample, a row or a step is made of, as numbers that add up. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Addable:
    """Values that add up field by field."""

    def __add__(self, other):
        return type(self)(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(Addable):
    """What a sample, a row or a step is made of, padding left out."""

    tokens: int = 0  # of the text stream, tile tokens included
    pairs: int = 0  # of a token and one that it sees in self-attention: s (s + 1) / 2 for a sample of s tokens
    outputs: int = 0  # positions with a label: they alone go through the output layer
    tiles: int = 0  # encoded
    projected: int = 0  # tiles that go through the projector: to the stream or to the keys
    keys: int = 0  # cross-attended tokens
    cross_pairs: int = 0  # of a token and a key that it sees
