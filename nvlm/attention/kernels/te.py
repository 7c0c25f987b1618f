"""Transformer Engine's attention (cuDNN's or flash attention) within the samples of one line, for training on a GPU.

Importing this module imports Transformer Engine.

Shapes: S columns, X keys, B rows, T tokens of a line, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from nvlm.attention.cache import KeepsKeys
from nvlm.attention.kernel import Kernel, View
from nvlm.attention.rows import samples_in_line
from nvlm.config.values import Config
from nvlm.data.batch import Batch


class PackedAttention(TEDotProductAttention, KeepsKeys):
    """As `CoreAttention`, but a Transformer Engine module; `packed` is Transformer Engine's own forward."""

    def forward(self, query_SBND: Tensor, key_XBGD: Tensor, value_XBGD: Tensor, view: View, **_) -> Tensor:
        """[S, B, N * D]."""
        if self.cache is not None:
            key_XBGD, value_XBGD = self.cache.append(key_XBGD, value_XBGD)
        return view.attend(query_SBND, key_XBGD, value_XBGD, core=self)

    def packed(self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, samples: PackedSeqParams) -> Tensor:
        """[T, N * D]: causal within each sample."""
        causal = AttnMaskType.padding_causal
        return super().forward(query_TND, key_TGD, value_TGD, None, causal, packed_seq_params=samples).flatten(1)


class Packed(Kernel):
    """Its mask holds the boundaries of the samples in a line, each of at most `longest` tokens."""

    core = PackedAttention

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def columns(self, batch: Batch) -> View:
        """For a batch of one concatenated row."""
        return View(self, samples_in_line(batch.on_host.sample[0], self.longest, batch.tokens.device))

    def attend(
        self,
        query_T1ND: Tensor,
        key_T1GD: Tensor,
        value_T1GD: Tensor,
        mask: PackedSeqParams,
        scale: float | None = None,
        core: nn.Module | None = None,
    ) -> Tensor:
        """[T, 1, N * D]."""
        return core.packed(*(x.squeeze(1) for x in (query_T1ND, key_T1GD, value_T1GD)), mask).unsqueeze(1)


def build(config: Config) -> Packed:
    """For the row length of `config`."""
    return Packed(max(config.data.seq_length, config.data.row_length))
