"""Replaces placeholders in the text stream by projected tiles."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nvlm.arch.pictures import picture_tokens
from nvlm.data.batch import IMAGE, Batch
from nvlm.processes.device import to_device


def fill(
    words_BSH: Tensor,
    batch: Batch,
    columns_S: Tensor,
    project: Callable[[Tensor], Tensor],
    row_end_H: Tensor | None = None,
) -> Tensor:
    """`words_BSH`, the embeddings of the columns `columns_S`, with placeholders replaced by tile tokens.

    Only what these columns need is projected. `columns_S` is on the device of `batch.on_host`.
    """
    host, device = batch.on_host, words_BSH.device
    places_BL = host.tokens == IMAGE
    numbers_BL = places_BL.flatten().cumsum(0).view_as(places_BL) - 1  # number of the tile token at each placeholder
    places_N = places_BL[:, columns_S].flatten().nonzero()[:, 0]
    numbers_N = numbers_BL[:, columns_S].flatten()[places_N].cpu()
    tiles_NH = picture_tokens(batch, batch.stream_rows[numbers_N], project, row_end_H).to(words_BSH.dtype)
    places_N = to_device(places_N, device)
    return words_BSH.flatten(0, 1).index_put((places_N,), tiles_NH).view_as(words_BSH)
