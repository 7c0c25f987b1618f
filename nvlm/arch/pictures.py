"""Projected image tokens, one for each placeholder.

Shapes: n placeholders, k tile tokens that they are made of, m mixed tokens among them, N tokens of all tiles of the
batch, H model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nvlm.data.batch import ROW_END, Batch
from nvlm.processes.device import to_device


def picture_tokens(
    batch: Batch, rows_n: Tensor, project: Callable[[Tensor], Tensor], row_end_H: Tensor | None = None
) -> Tensor:
    """The tokens [n, H] for the placeholders with row numbers `rows_n`, on the CPU.

    Tile tokens are projected once each, even if several mixed tokens are made of them. `row_end_H`: the learned vector
    at the end of each row of a map. None if there are no such rows.
    """
    tokens = int(batch.tile_tokens.sum())
    mixed_n, ends_n = rows_n >= tokens, rows_n == ROW_END
    if row_end_H is None and not mixed_n.any():
        return project(batch.features_of(rows_n))
    sources_k = batch.sources_of(rows_n)
    known = [project(batch.features_of(sources_k))]
    # Where each of `rows_n` is in `known`, one after the other.
    place_N = torch.full((tokens,), -1, device="cpu")
    place_N[sources_k] = torch.arange(len(sources_k), device="cpu")
    places_n = torch.where(mixed_n | ends_n, 0, place_N[rows_n.clamp(0, max(tokens - 1, 0))]) if tokens else rows_n * 0
    if mixed_n.any():
        numbers = rows_n[mixed_n] - tokens
        places_n[mixed_n] = len(sources_k) + torch.arange(len(numbers), device="cpu")
        known.append(_mixed(known[0], place_N, batch, numbers))
    if row_end_H is not None:
        places_n[ends_n] = sum(map(len, known))
        known.append(row_end_H.to(known[0].dtype)[None])
    return torch.cat(known).index_select(0, to_device(places_n, known[0].device))


def _mixed(tokens_kH: Tensor, place_N: Tensor, batch: Batch, numbers_m: Tensor) -> Tensor:
    """The mixed tokens `numbers_m`, [m, H], from projected tile tokens, which are at `place_N`."""
    device = tokens_kH.device
    places_m4 = to_device(place_N[batch.mixed_rows[numbers_m]], device)
    weights_m4 = to_device(batch.mixed_weights[numbers_m], device).to(tokens_kH.dtype)
    largest_m = batch.mixed_largest[numbers_m]
    parts_m4H = tokens_kH.index_select(0, places_m4.flatten()).unflatten(0, (-1, 4))
    sums_mH = torch.einsum("mk,mkh->mh", weights_m4, parts_m4H)
    if not largest_m.any():
        return sums_mH
    return torch.where(to_device(largest_m, device)[:, None], parts_m4H.amax(1), sums_mH)
