"""Cross entropy over a vocabulary that is split over tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor


def token_losses(logits_SBV: Tensor, labels_SB: Tensor) -> Tensor:
    """Losses [S, B] in fp32. For bf16 on a GPU, two fused kernels avoid an fp32 copy of the logits; they return the
    gradient in bf16, whatever the type of the logits."""
    if logits_SBV.is_cuda and logits_SBV.dtype == torch.bfloat16:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy  # compiles

        group = parallel_state.get_tensor_model_parallel_group()
        return fused_vocab_parallel_cross_entropy(logits_SBV, labels_SB, group)
    return tensor_parallel.vocab_parallel_cross_entropy(logits_SBV.float(), labels_SB)
