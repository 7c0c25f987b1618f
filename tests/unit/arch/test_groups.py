"""The module group of each parameter, by its name."""

from __future__ import annotations

import pytest

from nvlm.arch.groups import parameter_group


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("projector.norm.weight", "projector"),
        ("fusion.tile_norm.weight", "xattn"),
        ("embedding.word_embeddings.weight", "llm"),
        ("decoder.layers.11.mlp.linear_fc1.adapter.down.weight", "llm"),
        ("decoder.layers.0.cross_attention.gate", "xattn"),
        ("decoder.layers.7.pre_cross_attn_layernorm.weight", "xattn"),
    ],
)
def test_a_group_by_the_name(name, group):
    assert parameter_group(name) == group


@pytest.mark.parametrize(
    "name",
    ["encoder.class_embedding", "resampler.weight", "decoder.layers.3.memory.weight", "decoder.layers"],
)
def test_a_parameter_that_no_group_has_is_an_error_with_its_name(name):
    with pytest.raises(ValueError, match=f"^parameter {name}: got no module group"):
        parameter_group(name)
