"""Names of low-rank adapters, and merging adapters into their weights. Independent of Megatron."""

from __future__ import annotations

import torch
from torch import Tensor

ADAPTER = "adapter"
_ROWS = 4096  # rows merged at a time, because fp32 copies of a whole weight of a 72B model take gigabytes


@torch.no_grad()
def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The weight [out, in] that replaces base and adapter, summed in fp32. Shards of a split linear merge in the same
    way: column-parallel ones with their shard of `up`, row-parallel ones with their shard of `down`."""
    merged = torch.empty_like(weight)
    for out, base, rows in zip(merged.split(_ROWS), weight.split(_ROWS), up.split(_ROWS)):
        out.copy_(base.float() + scale * rows.float() @ down.float())
    return merged


def adapter_names(name: str) -> tuple[str, str]:
    """Names of `down` and `up` of the adapter that belongs to the weight `name`."""
    linear = name.removesuffix("weight")
    return f"{linear}{ADAPTER}.down.weight", f"{linear}{ADAPTER}.up.weight"


def is_adapter(name: str) -> bool:
    """Whether the parameter `name` belongs to an adapter."""
    return f".{ADAPTER}." in name
