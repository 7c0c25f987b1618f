"""The frozen encoder, in few passes, has the features of the Megatron module that it is made of."""

from __future__ import annotations

import pytest
import torch

from nvlm.vision.encoders.inference import FrozenEncoder
from nvlm.vision.encoders.internvit.model import InternViT
from nvlm.vision.path import solo_groups
from tests.models import TILE, small_config

KINDS = {
    "InternViT-6B": (),
    "InternViT-300M": ("vision.norm=layer", "vision.qkv_bias=true", "vision.qk_norm=false"),
}
TOKENS = 17  # of a tile: 16 patches after the class token

pytestmark = pytest.mark.usefixtures("megatron")


def encoder_of(kind: str) -> tuple[InternViT, object]:
    """With random weights, all of which show; scales from 0.1 to 2."""
    config = small_config("arch=decoder", *KINDS[kind])
    encoder, generator = InternViT(config, solo_groups()).eval(), torch.Generator().manual_seed(4)
    for name, parameter in encoder.named_parameters():
        if "layer_scale" in name:
            parameter.data.uniform_(0.1, 2, generator=generator)
        else:
            parameter.data.normal_(std=0.3, generator=generator)
    return encoder, config.vision


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_those_of_the_unfolded_encoder(kind, multiple):
    encoder, vision = encoder_of(kind)
    pixels = torch.randn(3, 3, TILE, TILE, generator=torch.Generator().manual_seed(5))
    expected = encoder(pixels)
    got = FrozenEncoder(encoder, vision, multiple)(pixels)
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


@torch.no_grad()
def test_padding_is_the_last_patch_in_every_layer():
    encoder, vision = encoder_of("InternViT-6B")
    frozen, inputs = FrozenEncoder(encoder, vision, multiple=16), []
    for layer in frozen.layers:
        for linear in (layer.qkv, layer.proj, layer.fc1, layer.fc2):
            linear.register_forward_pre_hook(lambda linear, given: inputs.append(given[0]))
    frozen(torch.randn(3, 3, TILE, TILE))
    assert len(inputs) == 8 and all(x.shape[1] == 32 and x.is_contiguous() for x in inputs)
    for x in inputs:
        last = x[:, TOKENS - 1 : TOKENS]
        torch.testing.assert_close(x[:, TOKENS:], last.expand(-1, 32 - TOKENS, -1))


def test_it_takes_over_the_weights_without_a_copy():
    encoder, vision = encoder_of("InternViT-300M")
    places = {parameter.data_ptr() for parameter in encoder.parameters()}
    frozen = FrozenEncoder(encoder, vision, multiple=16)
    apart = [name for name, p in frozen.named_parameters() if p.data_ptr() not in places]
    assert apart == ["position_embedding"] and not any(p.requires_grad for p in frozen.parameters())
