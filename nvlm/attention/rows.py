"""The rows of a micro-batch, arranged as kernels need them.

Shapes: B rows, S columns of a row, T tokens of the concatenated rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nvlm.attention.choice import Rows
from nvlm.data.batch import PAD, Batch, in_line, without_padding
from nvlm.processes.device import to_device


@dataclass(frozen=True, slots=True)
class Arranged:
    """A batch as it is computed, and how to restore the original rows."""

    batch: Batch
    shape: tuple[int, int] | None = None  # (B, S) before concatenation; None: rows are unchanged
    columns_T: Tensor | None = None  # original flat index of each token; None: none was dropped

    def restored(self, numbers: Tensor) -> Tensor:
        """[B, S] from one number per token of the computed batch; zero for tokens that were dropped."""
        if self.shape is None:
            return numbers
        if self.columns_T is None:
            return numbers.view(self.shape)
        zeros = numbers.new_zeros(self.shape[0] * self.shape[1])
        return zeros.index_copy(0, self.columns_T, numbers[0]).view(self.shape)


def arranged(batch: Batch, rows: Rows, multiple: int) -> Arranged:
    """`batch` with its rows arranged as `rows` says; without padding, the length is a multiple of `multiple`."""
    if rows is Rows.KEPT:
        return Arranged(batch)
    if rows is Rows.LINE:
        return Arranged(in_line(batch), tuple(batch.tokens.shape))
    line, columns_T = without_padding(batch, multiple)
    return Arranged(line, tuple(batch.tokens.shape), columns_T)


def arranged_shape(batch: Batch, rows: Rows) -> tuple[int, int] | None:
    """Columns and rows of `batch` once it is arranged; None if its padding decides."""
    count, columns = batch.tokens.shape
    return {Rows.KEPT: (columns, count), Rows.LINE: (count * columns, 1)}.get(rows)


def samples_in_line(sample_T: Tensor, longest: int, device: torch.device) -> PackedSeqParams:
    """The boundaries of the samples in a line, of at most `longest` tokens each, for kernels on `device`.

    Padding is treated as samples of its own: nothing attends to it, and removing it would cost more.
    """
    numbers_T = torch.arange(len(sample_T), device=sample_T.device)
    begins_T = (sample_T == PAD) & (numbers_T % longest == 0)
    begins_T[1:] |= sample_T[1:] != sample_T[:-1]
    begins_T[0] = True
    ends = to_device(torch.cat((begins_T.nonzero()[:, 0], numbers_T[-1:] + 1)).int(), device)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
