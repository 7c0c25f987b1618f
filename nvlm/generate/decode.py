"""Decodes rows of prompts token by token.

Keys and values of self-attention and of the images are computed once and cached (nvlm.attention.cache). With context
parallelism, where several ranks share a row's columns, each token recomputes its row.

Shapes: B rows, L columns of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import pad

from nvlm.arch.pipeline import Pipeline, next_logits, share_from_last
from nvlm.attention.cache import KeyValues, Past, cached, generating
from nvlm.attention.visibility import unseen_keys
from nvlm.data.batch import ALL_TILES, IGNORE, PAD, Batch
from nvlm.generate.choose import Chooser
from nvlm.generate.sampling import Sampling
from nvlm.processes import device

# The fields of a batch with one value per column, and their values in padding.
_COLUMNS = {"tokens": 0, "labels": IGNORE, "positions": 0, "sample": PAD, "image": PAD, "tile": ALL_TILES}

Tell = Callable[[int, int], None]
"""Called with each new token: (row, id)."""


def continue_rows(
    pipeline: Pipeline,
    batch: Batch,
    sampling: Sampling,
    ends: Collection[int],
    multiple: int = 1,
    tell: Tell = lambda row, token: None,
    recompute: bool = False,
) -> list[list[int]]:
    """The ids generated for each row of `batch` (one sample per row, tiles encoded), including the final one of `ends`.

    A collective call of a replica's ranks. `multiple`: the row length must be a multiple of it when rows are recomputed
    (with context parallelism or `recompute`).
    """
    batch = replace(batch, host=None)  # the copy on the host does not grow with the rows
    recompute = recompute or parallel_state.get_context_parallel_world_size() > 1
    rows = _Whole(batch, sampling.max_new_tokens, multiple) if recompute else _Kept(batch)
    choose, texts = Chooser(sampling, len(batch.tokens)), [[] for _ in batch.tokens]
    caching = nullcontext([]) if recompute else cached(pipeline.parts)
    with generating(pipeline.parts), device.untranslated(), caching as caches:
        while True:
            logits_BV = next_logits(pipeline, rows.batch, rows.last_B, rows.past)
            tokens_B = torch.zeros_like(rows.last_B) if logits_BV is None else choose(logits_BV, rows.numbers)
            tokens_B = share_from_last(tokens_B)
            tokens = tokens_B.tolist()
            for row, token in zip(rows.numbers, tokens):
                if not texts[row] or texts[row][-1] not in ends:  # recomputed rows stay after they have ended
                    texts[row].append(token)
                    tell(row, token)
            unfinished = [texts[row][-1] not in ends for row in rows.numbers]
            if not any(unfinished) or max(map(len, texts)) == sampling.max_new_tokens:
                return texts
            rows.append(tokens_B)
            if not recompute:
                rows.select(unfinished, caches)


class _Whole:
    """Rows that are recomputed in full for each token, in a buffer with room for the new tokens."""

    past = None

    def __init__(self, batch: Batch, room: int, multiple: int) -> None:
        self.last_B = _last_columns(batch)
        self.length, self.multiple = int(self.last_B.max()) + 1, multiple
        room += -(batch.tokens.shape[1] + room) % multiple
        wider = {name: pad(getattr(batch, name), (0, room), value=value) for name, value in _COLUMNS.items()}
        self.room, self.numbers = replace(batch, **wider), range(len(batch.tokens))

    @property
    def batch(self) -> Batch:
        """The batch up to the last column written, rounded up to the multiple."""
        end = self.length + -self.length % self.multiple
        return replace(self.room, **{name: getattr(self.room, name)[:, :end] for name in _COLUMNS})

    def append(self, tokens_B: Tensor) -> None:
        """Write a token for each row, all in one new column; in shorter rows it follows the padding."""
        rows, column = self.room, self.length
        before = torch.arange(len(tokens_B), device=tokens_B.device), self.last_B
        rows.tokens[:, column] = tokens_B
        rows.positions[:, column] = rows.positions[before] + 1
        for numbers in (rows.sample, rows.image, rows.tile):
            numbers[:, column] = numbers[before]
        self.last_B = torch.full_like(self.last_B, column)
        self.length += 1


class _Kept:
    """Rows whose prompts are computed once; after that the batch is the newest column, and caches hold the others."""

    def __init__(self, batch: Batch) -> None:
        self.past, self.last_B = None, _last_columns(batch)
        length = int(self.last_B.max()) + 1  # columns that are padding in all rows need not be cached
        self.batch = replace(batch, **{name: getattr(batch, name)[:, :length] for name in _COLUMNS})
        self.numbers: Sequence[int] = range(len(batch.tokens))  # of the remaining rows in the original batch

    def append(self, tokens_B: Tensor) -> None:
        """Replace the batch by one new column with a token for each row; in shorter rows it follows the padding."""
        if self.past is None:
            padding_B11X = (self.batch.sample == PAD)[:, None, None]
            before = torch.arange(len(tokens_B), device=tokens_B.device), self.last_B
            self.batch = replace(self.batch, **{name: getattr(self.batch, name)[before][:, None] for name in _COLUMNS})
            self.last_B = torch.zeros_like(self.last_B)
            self.past = Past(padding_B11X, unseen_keys(self.batch, self.last_B[:1])).shortened()
        self.past = self.past.grown()
        self.batch = replace(self.batch, tokens=tokens_B[:, None], positions=self.batch.positions + 1)

    def select(self, unfinished: Sequence[bool], caches: Sequence[KeyValues]) -> None:
        """Keep only the rows marked `unfinished`."""
        if all(unfinished):
            return
        kept = torch.tensor(unfinished, device=self.last_B.device).nonzero()[:, 0]
        self.numbers = [row for row, keep in zip(self.numbers, unfinished) if keep]
        self.batch = replace(self.batch, **{name: getattr(self.batch, name)[kept] for name in _COLUMNS})
        self.last_B, self.past = self.last_B[kept], self.past.selected(kept).shortened()
        for cache in caches:
            cache.select(kept)


def _last_columns(batch: Batch) -> Tensor:
    """The column of each row's last token, [B]."""
    return (torch.arange(batch.tokens.shape[1], device=batch.tokens.device) * (batch.sample != PAD)).amax(1)
