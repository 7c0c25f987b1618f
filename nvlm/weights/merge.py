"""Low-rank adapters by name, and merged into the weights beside them. Knows no Megatron."""

from __future__ import annotations

import torch
from torch import Tensor

ADAPTER = "adapter"
_ROWS = 4096  # merged at once: fp32 copies of a whole weight of a 72B model are gigabytes


@torch.no_grad()
def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The weight [out, in] of one linear that does what base and adapter do; summed in fp32. Parts of a split linear
    merge as the whole does: column-parallel ones with their part of `up`, row-parallel ones with theirs of `down`."""
    merged = torch.empty_like(weight)
    for out, base, rows in zip(merged.split(_ROWS), weight.split(_ROWS), up.split(_ROWS)):
        out.copy_(base.float() + scale * rows.float() @ down.float())
    return merged


def adapter_names(name: str) -> tuple[str, str]:
    """What `down` and `up` beside the weight `name` would be called."""
    linear = name.removesuffix("weight")
    return f"{linear}{ADAPTER}.down.weight", f"{linear}{ADAPTER}.up.weight"


def is_adapter(name: str) -> bool:
    """Whether the parameter `name` is an adapter's."""
    return f".{ADAPTER}." in name
