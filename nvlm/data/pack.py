"""Packing: whole samples into rows under two budgets, rows into one Batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nvlm.batch import ALL_TILES, IGNORE, PAD, Batch, Sample


def pack(lengths: Sequence[tuple[int, int]], seq_budget: int, cross_budget: int) -> list[list[int]]:
    """First-fit decreasing: indices of `lengths` (text tokens, cross-attended tokens) by row, longest row first.

    A sample over the text budget gets a row of its own.
    """
    rows: list[tuple[list[int], list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i][0], -lengths[i][1], i)):
        seq, cross = lengths[index]
        for members, used in rows:  # noqa: B007
            if used[0] + seq <= seq_budget and used[1] + cross <= cross_budget:
                break
        else:
            members, used = [], [0, 0]
            rows.append((members, used))
        members.append(index)
        used[0] += seq
        used[1] += cross
    return [members for members, _ in sorted(rows, key=lambda row: -row[1][0])]


def collate(rows: Sequence[Sequence[Sample]], tile_size: int, multiple: int = 8) -> Batch:
    """Lay each row's samples one behind the other; pad rows to the longest, rounded up to `multiple` tokens.

    No rows at all give one row of padding, so that a rank without data still takes part in the step.
    """
    rows = rows or [[]]

    def along(name: str) -> list[Tensor]:
        return [torch.cat([getattr(s, name) for s in row]) if row else torch.zeros(0).long() for row in rows]

    def numbered(name: str) -> list[Tensor]:
        lengths = [[getattr(s, name).numel() for s in row] for row in rows]
        return [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n, dtype=torch.long)) for n in lengths]

    def padded(parts: list[Tensor], value: int) -> Tensor:
        stacked = pad_sequence(parts, batch_first=True, padding_value=value)
        short = max(-stacked.shape[1] % multiple, multiple if stacked.shape[1] == 0 else 0)
        return torch.nn.functional.pad(stacked, (0, short), value=value)

    samples = [sample for row in rows for sample in row]
    first_tile = torch.tensor([0, *(s.pixels.shape[0] for s in samples)]).cumsum(0)
    tags = [torch.tensor(tag, dtype=torch.long) for s in samples for tag in s.cross_tags]
    empty = torch.zeros(0, 3, tile_size, tile_size, dtype=torch.uint8)

    def tiles(name: str) -> Tensor:
        parts = [getattr(s, name) + start for s, start in zip(samples, first_tile)]
        return torch.cat(parts) if parts else torch.zeros(0).long()

    def owners(name: str) -> Tensor:
        counts = [(r, i, getattr(s, name).numel()) for r, row in enumerate(rows) for i, s in enumerate(row)]
        return torch.tensor([(r, i) for r, i, n in counts for _ in range(n)], dtype=torch.long).view(-1, 2)

    positions = [torch.cat([torch.arange(s.tokens.numel()) for s in r]) if r else torch.zeros(0).long() for r in rows]
    return Batch(
        ids=tuple(tuple(s.id for s in row) for row in rows),
        tokens=padded(along("tokens"), 0),
        labels=padded(along("labels"), IGNORE),
        positions=padded(positions, 0),
        sample=padded(numbered("tokens"), PAD),
        image=padded(along("image"), PAD),
        tile=padded(along("tile"), ALL_TILES),
        stream_tiles=tiles("stream_tiles"),
        stream_owners=owners("stream_tiles"),
        cross_tokens=padded(along("cross_tokens"), 0),
        cross_sample=padded(numbered("cross_tokens"), PAD),
        cross_image=padded(along("cross_image"), PAD),
        cross_tile=padded(along("cross_tile"), PAD),
        cross_tiles=tiles("cross_tiles"),
        cross_owners=owners("cross_tiles"),
        cross_tags=pad_sequence(tags, batch_first=True, padding_value=PAD) if tags else torch.zeros(0, 0).long(),
        pixels=torch.cat([s.pixels for s in samples]) if samples else empty,
    )
