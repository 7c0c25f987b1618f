"""What an encoder that learns keeps for its backward pass, compared with torch's saved tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nvlm.attention.choice import CPU, kernels_of
from nvlm.estimate.encoder import kept_by_tile
from nvlm.vision.encoders.internvit.model import InternViT
from nvlm.vision.path import solo_groups
from tests.models import TILE, small_config

TILES = 5
KINDS = [(), ("vision.norm=layer", "vision.qk_norm=false", "vision.qkv_bias=true")]

pytestmark = pytest.mark.usefixtures("megatron")


def kept(encoder: torch.nn.Module) -> int:
    """Bytes that a forward pass keeps, without parameters."""
    there, sizes = {p.untyped_storage().data_ptr() for p in encoder.parameters()}, {}
    alive = []  # no other tensor gets their places

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in there:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        encoder.train()(torch.randn(TILES, 3, TILE, TILE))
    return sum(sizes.values())


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_an_encoder_that_learns_keeps_what_is_foretold(kind):
    config = small_config("stage.train_vision=true", "vision.hidden=24", *kind)
    kernels = dataclasses.replace(kernels_of(config, CPU), norm=4, normalized=4, attention=4)
    assert kept(InternViT(config, solo_groups())) == pytest.approx(TILES * kept_by_tile(config, kernels), rel=0.05)
    again = small_config("stage.train_vision=true", "vision.hidden=24", *kind, "train.recompute=full")
    hidden = 17 * 24 * 4  # of a tile: its patches and the class token
    assert kept_by_tile(again, kernels) < kept_by_tile(config, kernels)
    assert kept_by_tile(again, kernels) > config.vision.layers * hidden
