"""Every kind of projector against torch's own layers with the same weights, and its parameters against the list."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nvlm.arch.base import Projector
from nvlm.config.modules import Linear, Norm, Parameter
from nvlm.estimate.model import projector_modules
from nvlm.processes import groups

KINDS = ("nvlm", "linear", "mlp2x_gelu", "mlp_downsample", "mlp_downsample_3x3")


@pytest.fixture(scope="module")
def joined(configured):
    with groups.distributed(configured().parallel, seed=0):
        yield


def plain(kind: str, width: int, hidden: int, ffn: int) -> nn.Sequential:
    """The projector as its own repository writes it."""
    two = (nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    third = width // 3
    layers = {
        "nvlm": lambda: (
            nn.LayerNorm(width), nn.Linear(width, ffn, bias=False), nn.GELU(), nn.Linear(ffn, hidden, bias=False)
        ),
        "linear": lambda: (nn.Linear(width, hidden),),
        "mlp2x_gelu": lambda: two,
        "mlp_downsample": lambda: (nn.LayerNorm(width), *two),
        "mlp_downsample_3x3": lambda: (
            nn.LayerNorm(width), nn.Linear(width, third), nn.GELU(), nn.LayerNorm(third), nn.Linear(third, hidden),
            nn.GELU(), nn.Linear(hidden, hidden),
        ),
    }  # fmt: skip
    return nn.Sequential(*layers[kind]())


@pytest.mark.parametrize("kind", KINDS)
def test_a_projector_equals_torchs_layers(configured, joined, kind):
    size = 3 if kind.endswith("3x3") else 2
    config = configured(
        "arch=decoder", "precision=fp32", f"projector={kind}", f"vision.downsample={size}",
        "vision.tile_size=84", "tiling=anyres",
    )  # fmt: skip
    torch.manual_seed(0)
    ours, width, hidden = Projector(config, config.projector.kind or "mlp"), config.vision.feature_width, 128
    theirs = plain(kind, width, hidden, config.llm.ffn)
    with torch.no_grad():
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.1)
        # Both list their parameters in the order of computation; the row's end is ours alone.
        for own, other in zip(
            [p for n, p in ours.named_parameters() if n != "row_end"], theirs.parameters(), strict=True
        ):
            own.copy_(other)
    x = torch.randn(5, width)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)

    listed = {}
    for module in projector_modules(config):
        match module:
            case Parameter(name=name, size=size):
                listed[name] = size
            case Linear(name=name, inputs=inputs, outputs=outputs):
                listed[f"{name}.weight"] = inputs * outputs
                listed |= {f"{name}.bias": outputs} if module.bias else {}
            case Norm(name=name, width=norm):
                listed |= {f"{name}.weight": norm, f"{name}.bias": norm}
    assert listed == {f"projector.{name}": p.numel() for name, p in ours.named_parameters()}
