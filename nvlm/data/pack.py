"""Packing: samples into rows under two budgets, rows into steps, and the rows of a micro-batch into a Batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nvlm.data.batch import ALL_TILES, IGNORE, PAD, ROW_END, Batch, Sample, places_of

_SPARE = 1.01  # first number of rows, over the minimum for the tighter budget: a little slack lets rows come out even
_MOST = 1.05  # limit on the number of even rows, relative to first-fit decreasing


def pack(lengths: Sequence[tuple[int, int]], seq_budget: int, cross_budget: int, at_least: int = 1) -> list[list[int]]:
    """Indices of `lengths` (text tokens, cross-attended tokens) by row, longest row first: few rows of even length.

    Even rows need little padding when batched, whichever budget fills up first, and take equal work. A sample over a
    budget gets a row of its own. Returns at least `at_least` rows if there are that many samples.
    """
    sizes = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    budgets = np.array([seq_budget, cross_budget])
    fits = (sizes <= budgets).all(axis=1)
    rows = [[int(index)] for index in np.flatnonzero(~fits)]
    if fits.any():
        shared = np.flatnonzero(fits)
        rows += [[int(shared[i]) for i in row] for row in _share(sizes[shared], budgets, at_least - len(rows))]
    return sorted(rows, key=lambda row: (*-sizes[row].sum(axis=0), row[0]))


def _share(sizes: np.ndarray, budgets: np.ndarray, at_least: int) -> list[list[int]]:
    """About the fewest possible even rows, or the rows of first-fit decreasing if those are clearly fewer."""
    total = sizes.sum(axis=0)
    order = np.argsort(-(sizes / np.maximum(budgets, 1)).max(axis=1), kind="stable")
    tight = _place(sizes, budgets, order, 1, np.zeros(2))
    weights = 1 / np.maximum(total, 1) ** 2.0  # both budgets count equally
    needed = float((total / np.maximum(budgets, 1)).max())
    count = max(min(math.ceil(_SPARE * needed), len(tight)), min(at_least, len(sizes)))
    most = _MOST * len(tight) if len(tight) >= at_least else len(sizes)
    while count <= most:
        even = _place(sizes, budgets, order, count, weights)
        if len(even) == count:
            return even
        count = max(len(even), math.ceil(_SPARE * count))
    return tight


def _place(sizes: np.ndarray, budgets: np.ndarray, order: np.ndarray, count: int, weights: np.ndarray):
    """Put each sample of `order` into one of `count` rows, or into a new row if none has room.

    Picks the row with room in which `weights` x used x size is smallest, the first one on a tie.
    """
    rows: list[list[int]] = [[] for _ in range(count)]
    text, keys, masked = np.zeros((3, count + len(order)))  # what each row holds; floats are exact here
    places, (most_text, most_keys), (text_weight, key_weight) = order.tolist(), budgets.tolist(), weights.tolist()
    # Not a matrix product: its rounding depends on the machine, and all machines must get the same rows.
    for index, (more_text, more_keys) in zip(places, sizes[order].tolist(), strict=True):
        text_here, keys_here, crowding = (column[: len(rows)] for column in (text, keys, masked))
        full = (text_here > most_text - more_text) | (keys_here > most_keys - more_keys)
        if not text_weight and not key_weight:
            row = int(full.argmin())  # the first with room
        else:
            np.multiply(text_here, text_weight * more_text, out=crowding)
            crowding += keys_here * (key_weight * more_keys)
            crowding[full] = np.inf
            row = int(crowding.argmin())
        if full[row]:
            row = len(rows)
            rows.append([])
        rows[row].append(index)
        text[row] += more_text
        keys[row] += more_keys
    return rows


def deal[Row](rows: Sequence[Row], steps: int, seed: Sequence[int]) -> list[list[Row]]:
    """Distribute rows, longest first, over steps: of every `steps` similar rows, each step gets one at random."""
    generator = np.random.Generator(np.random.PCG64(list(seed)))
    hands: list[list[Row]] = [[] for _ in range(steps)]
    for start in range(0, len(rows), steps):
        for row, step in zip(rows[start : start + steps], generator.permutation(steps)):
            hands[step].append(row)
    return hands


def hand_out(kinds: Sequence[Sequence[int]], replicas: int, seed: int, step: int) -> list[list[int]]:
    """The rows of `step` that each replica gets: of every `replicas` rows, longest first, each gets one.

    `kinds`: for each row, the number of each record's source. Each row goes to the replica with the fewest records of
    its sources so far, so that every replica sees every source in proportion. Ties are broken by a random order, which
    is turned by one replica from step to step, so that what does not come out even does over `replicas` steps.
    """
    count = 1 + max((kind for row in kinds for kind in row), default=0)
    rows = [np.bincount(row, minlength=count) for row in kinds]
    held = np.zeros((replicas, count), dtype=np.int64)
    hands: list[list[int]] = [[] for _ in range(replicas)]
    turns = np.random.Generator(np.random.PCG64([seed, step // replicas])).permutation(replicas)
    lottery = (turns + step) % replicas
    for start in range(0, len(rows), replicas):
        chunk = range(start, min(start + replicas, len(rows)))
        for number in sorted(chunk, key=lambda number: tuple(rows[number])):
            ranked = held @ rows[number] * replicas + lottery
            full = [len(hand) > start // replicas for hand in hands]
            chosen = int(np.where(full, np.iinfo(np.int64).max, ranked).argmin())
            hands[chosen].append(number)
            held[chosen] += rows[number]
    return hands


def collate(
    rows: Sequence[Sequence[Sample]],
    tile_size: int,
    multiple: int = 8,
    *,
    step: int = 0,
    numbers: Sequence[int] | None = None,
    length: int | None = None,
) -> Batch:
    """Concatenate each row's samples; pad all rows to the longest, rounded up to a multiple of `multiple` tokens.

    `length`: the text stream of all rows gets this many tokens instead, at least those of the longest row.
    `numbers`: each row's number among the rows of all replicas in `step`; by default, 0, 1, ... If there are no rows,
    the batch is one row of padding, so that a rank without data still takes part in the step.
    """
    rows, numbers = rows or [[]], numbers or range(max(1, len(rows)))
    samples = [sample for row in rows for sample in row]

    def padded(name: str, value: int, length: int | None = length) -> Tensor:
        return _padded([_joined([getattr(s, name) for s in row]) for row in rows], value, multiple, length)

    def numbered(name: str, length: int | None = length) -> Tensor:
        return _padded([_numbered([getattr(s, name).numel() for s in row]) for row in rows], PAD, multiple, length)

    def counts(name: str) -> Tensor:
        return torch.tensor([getattr(s, name).numel() for s in samples], dtype=torch.long)

    positions = [_joined([torch.arange(s.tokens.numel()) for s in row]) for row in rows]
    tags = [torch.tensor(tag, dtype=torch.long) for s in samples for tag in s.cross_tags]
    tokens, cross_tokens = padded("tokens", 0), padded("cross_tokens", 0, None)
    empty = torch.zeros(0, 3, tile_size, tile_size, dtype=torch.uint8)
    return Batch(
        ids=tuple(tuple(s.id for s in row) for row in rows),
        tokens=tokens,
        labels=padded("labels", IGNORE),
        positions=_padded(positions, 0, multiple, length),
        sample=numbered("tokens"),
        image=padded("image", PAD),
        tile=padded("tile", ALL_TILES),
        stream_rows=_tile_rows(samples, "stream_rows"),
        stream_counts=counts("stream_rows"),
        place=places_of(step, numbers, tokens.shape[1]),
        cross_tokens=cross_tokens,
        cross_place=places_of(step, numbers, cross_tokens.shape[1]),
        cross_sample=numbered("cross_tokens", None),
        cross_image=padded("cross_image", PAD, None),
        cross_tile=padded("cross_tile", PAD, None),
        cross_rows=_tile_rows(samples, "cross_rows"),
        cross_counts=counts("cross_rows"),
        cross_lengths=torch.tensor([n for s in samples for n in s.cross_lengths], dtype=torch.long),
        cross_tags=pad_sequence(tags, batch_first=True, padding_value=PAD) if tags else torch.zeros(0, 0).long(),
        mixed_rows=_mixed_rows(samples),
        mixed_weights=torch.cat([torch.zeros(0, 4), *(s.mixed_weights for s in samples)]),
        mixed_largest=torch.cat([torch.zeros(0, dtype=torch.bool), *(s.mixed_largest for s in samples)]),
        tile_tokens=_joined([s.tile_tokens for s in samples]),
        holder=_joined([s.holder for s in samples]),
        pixels=torch.cat([s.pixels for s in samples]) if samples else empty,
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0).long()


def _numbered(lengths: list[int]) -> Tensor:
    """Each sample's number within its row, repeated for each of its tokens."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))


def _padded(rows: list[Tensor], value: int, multiple: int, length: int | None) -> Tensor:
    """[B, `length`]; without one, [B, longest row rounded up to a multiple of `multiple`], never empty."""
    stacked = pad_sequence(rows, batch_first=True, padding_value=value)
    short = (length or max(multiple, math.ceil(stacked.shape[1] / multiple) * multiple)) - stacked.shape[1]
    assert short >= 0, f"a row of {stacked.shape[1]} tokens, expected at most {length}"
    return torch.nn.functional.pad(stacked, (0, short), value=value)


def _first_rows(samples: list[Sample]) -> list[int]:
    """The number of each sample's first row within the batch, and the number of rows."""
    return [0, *accumulate(int(sample.tile_tokens.sum()) for sample in samples)]


def _tile_rows(samples: list[Sample], name: str) -> Tensor:
    """Row numbers of tile tokens and mixed ones, converted from numbers within a sample to numbers within the batch."""
    firsts = _first_rows(samples)
    mixed = [0, *accumulate(len(sample.mixed_rows) for sample in samples)]
    parts = []
    for sample, first, end, before in zip(samples, firsts, firsts[1:], mixed):
        rows, tokens = getattr(sample, name), end - first
        moved = torch.where(rows < tokens, rows + first, rows - tokens + firsts[-1] + before)
        parts.append(torch.where(rows == ROW_END, rows, moved))
    return _joined(parts)


def _mixed_rows(samples: list[Sample]) -> Tensor:
    parts = [sample.mixed_rows + first for sample, first in zip(samples, _first_rows(samples))]
    return torch.cat([torch.zeros(0, 4, dtype=torch.long), *parts])
