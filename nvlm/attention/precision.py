"""The precision in which torch's attention kernels compute."""

from __future__ import annotations

import torch
from torch import Tensor


def for_kernel(x: Tensor) -> Tensor:
    """`x` in the precision for attention: on CPU, torch's bf16 attention is several times slower than fp32."""
    return x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x
