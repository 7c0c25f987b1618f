"""Projected image tokens, one for each placeholder.

Shapes: n placeholders, k tile tokens that they are made of, m mixed tokens among them, N tokens of all tiles of the
batch, H model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nvlm.data.batch import PAD, ROW_END, Batch
from nvlm.processes.device import to_device


def picture_tokens(
    batch: Batch, rows_n: Tensor, project: Callable[[Tensor], Tensor], row_end_H: Tensor | None = None
) -> Tensor:
    """The tokens [n, H] for the placeholders with row numbers `rows_n`, on the CPU.

    Tile tokens are projected once each, even if several mixed tokens are made of them. `row_end_H`: the learned vector
    at the end of each row of a map. None if there are no such rows.
    """
    tokens = int(batch.tile_tokens.sum())
    mixed_m = rows_n[rows_n >= tokens]
    if row_end_H is None and not len(mixed_m):
        return project(batch.features_of(rows_n))
    sources_k = batch.sources_of(rows_n)
    known = [project(batch.features_of(sources_k))]
    # The place in `known` of each row; ROW_END is counted from the end.
    places = torch.full((tokens + len(batch.mixed_rows) - ROW_END,), PAD, device="cpu")
    places[sources_k] = torch.arange(len(sources_k), device="cpu")
    if len(mixed_m):
        known.append(_mixed(known[0], places, batch, mixed_m - tokens))
        places[mixed_m] = len(sources_k) + torch.arange(len(mixed_m), device="cpu")
    if row_end_H is not None:
        places[ROW_END] = len(sources_k) + len(mixed_m)
        known.append(row_end_H.to(known[0].dtype)[None])
    return torch.cat(known).index_select(0, to_device(places[rows_n], known[0].device))


def _mixed(tokens_kH: Tensor, places: Tensor, batch: Batch, numbers_m: Tensor) -> Tensor:
    """The mixed tokens `numbers_m`, [m, H], from projected tile tokens, whose rows are at `places`."""
    device = tokens_kH.device
    places_m4 = to_device(places[batch.mixed_rows[numbers_m]], device)
    weights_m4 = to_device(batch.mixed_weights[numbers_m], device).to(tokens_kH.dtype)
    largest_m = batch.mixed_largest[numbers_m]
    parts_m4H = tokens_kH.index_select(0, places_m4.flatten()).unflatten(0, (-1, 4))
    sums_mH = torch.einsum("mk,mkh->mh", weights_m4, parts_m4H)
    if not largest_m.any():
        return sums_mH
    return torch.where(to_device(largest_m, device)[:, None], parts_m4H.amax(1), sums_mH)
