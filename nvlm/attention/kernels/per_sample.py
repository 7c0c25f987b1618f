"""Self-attention sample by sample, for training on CPU.

torch has no CPU kernel for packed rows, and masked attention costs the square of the row length, most of it wasted.

Shapes: S columns, B rows, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nvlm.attention.kernel import TorchKernel, View
from nvlm.attention.kernels.dense import DENSE
from nvlm.config.values import Config
from nvlm.data.batch import PAD, Batch

Lengths = tuple[int, ...]
"""Lengths of the samples of all rows in order, each including the padding after it, to which nothing attends."""

WORTH_A_CALL = 2**13
"""Token pairs that an extra kernel call must save on CPU to be faster than a masked call.

Measured with rows of two samples and 4 heads of 32: saving 7200 pairs (60 tokens each) took 1.08 times as long, saving
16200 (90 tokens each) 0.86 times.
"""


class PerSample(TorchKernel):
    """Its mask is the lengths of the samples. If they are too short to be worth a call each, rows get a dense mask."""

    def columns(self, batch: Batch) -> View:
        """For whole rows."""
        lengths = lengths_apart(batch.on_host.sample)
        return DENSE.columns(batch) if lengths is None else View(self, lengths)

    def attended(
        self, query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask: Lengths, scale: float | None
    ) -> Tensor:
        """[B, N, S, D]: causal within each sample."""
        rows, _, columns, _ = query_BNSD.shape
        grouped = query_BNSD.shape[1] != key_BGSD.shape[1]
        causal = functools.partial(scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=grouped)
        if len(mask) == rows:
            return causal(query_BNSD, key_BGSD, value_BGSD)
        # Flatten, then split: the gradient of a slice would be as large as the whole tensor.
        lines = (x.transpose(1, 2).flatten(0, 1).split(mask) for x in (query_BNSD, key_BGSD, value_BGSD))
        attended = [causal(*(x.transpose(0, 1)[None] for x in sample))[0].transpose(0, 1) for sample in zip(*lines)]
        return torch.cat(attended).unflatten(0, (rows, columns)).transpose(1, 2)


def lengths_apart(sample_BS: Tensor) -> Lengths | None:
    """The lengths of the samples numbered by `sample_BS`; None if they are too short to be computed separately."""
    rows, columns = sample_BS.shape
    begins_BS = torch.ones_like(sample_BS, dtype=torch.bool)
    begins_BS[:, 1:] = (sample_BS[:, 1:] != sample_BS[:, :-1]) & (sample_BS[:, 1:] != PAD)
    begins = begins_BS.flatten().nonzero()[:, 0].tolist()
    lengths = tuple(end - begin for begin, end in zip(begins, [*begins[1:], sample_BS.numel()]))
    spared = rows * columns**2 - sum(length**2 for length in lengths)
    return None if spared < WORTH_A_CALL * (len(lengths) - rows) else lengths


def build(config: Config) -> PerSample:
    """The same kernel for every model."""
    return PerSample()
