"""Projected tiles take the place of the text stream's placeholders."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nvlm.batch import IMAGE, Batch


def fill(words_BSH: Tensor, batch: Batch, columns_S: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """`words_BSH`, the columns `columns_S` of the stream, with tile tokens in the place of their placeholders.

    Only the tile tokens that stand in these columns are projected.
    """
    places_BL = batch.tokens == IMAGE
    numbers_BL = places_BL.flatten().cumsum(0).view_as(places_BL) - 1  # which tile token stands here
    places_BS = places_BL[:, columns_S]
    features_NC = batch.features_of(batch.stream_tiles).flatten(0, 1)[numbers_BL[:, columns_S][places_BS]]
    return words_BSH.masked_scatter(places_BS[..., None], project(features_NC).to(words_BSH.dtype))
