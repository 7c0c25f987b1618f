"""Projected image tokens, one for each placeholder.

Shapes: n placeholders, H model width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nvlm.data.batch import ROW_END, Batch
from nvlm.processes.device import to_device


def picture_tokens(
    batch: Batch, rows_n: Tensor, project: Callable[[Tensor], Tensor], row_end_H: Tensor | None = None
) -> Tensor:
    """The tokens [n, H] for the placeholders with row numbers `rows_n`, on the CPU.

    `row_end_H`: the learned vector at the end of each row of a map. None if the architecture has no such rows.
    """
    if row_end_H is None:
        return project(batch.features_of(rows_n))
    tokens = (rows_n != ROW_END).nonzero()[:, 0]
    tokens_NH = project(batch.features_of(rows_n[tokens]))
    ends_nH = row_end_H.to(tokens_NH.dtype).expand(len(rows_n), -1)
    return ends_nH.index_put((to_device(tokens, tokens_NH.device),), tokens_NH)
