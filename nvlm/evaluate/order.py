"""In which order prompts are answered: sorted by length, in batches under two limits. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """The lengths of question `index`: columns of its text stream, cross-attended keys, tiles to encode. `digest`
    identifies it by its content."""

    index: int
    columns: int
    keys: int
    tiles: int
    digest: str = ""


def share(prompts: Sequence[Prompt], replica: int, replicas: int) -> list[Prompt]:
    """The prompts that `replica` answers, longest first. Each replica has as many as the others, and as long ones."""
    longest_first = sorted(prompts, key=lambda one: (-one.columns - one.keys, -one.columns, -one.tiles, one.index))
    return longest_first[replica::replicas]


def batches(prompts: Sequence[Prompt], rows: int, tokens: int, new: int) -> list[list[Prompt]]:
    """`prompts`, longest first, in batches of at most `rows` rows and `tokens` positions, padding included.

    A row takes the columns and keys of its batch's longest row, and `new` columns for its answer. One prompt over the
    limit is a batch of its own.
    """
    found: list[list[Prompt]] = []
    for prompt in prompts:
        wider = [*found[-1], prompt] if found else [prompt]
        width = max(one.columns for one in wider) + max(one.keys for one in wider) + new
        if found and len(wider) <= rows and len(wider) * width <= tokens:
            found[-1].append(prompt)
        else:
            found.append([prompt])
    return found
