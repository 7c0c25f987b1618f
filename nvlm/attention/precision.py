"""The precision that attention kernels of torch work in."""

from __future__ import annotations

import torch
from torch import Tensor


def for_kernel(x: Tensor) -> Tensor:
    """`x` in the precision that attention works in: torch's bf16 attention is several times slower on CPU."""
    return x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x
