"""The activation functions of towers, by their names in config.json."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu

from nvlm.processes.device import compiled


@compiled
def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_pytorch_tanh": partial(gelu, approximate="tanh")}
