"""The description of an architecture agrees with its placement rule and its code."""

from __future__ import annotations

import pytest

from nvlm.arch import registry
from nvlm.config.values import ConfigError
from nvlm.tiling.grid import TilePlan

ARCHITECTURES = ("decoder", "xattn", "hybrid")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tiles_and_tags_go_where_the_description_says(name):
    description, place = registry.description(name), registry.placement_rule(name)
    plan = TilePlan(2, 1, 448)
    bare, tagged = (place(plan, [(7,) * length] * plan.num_tiles, [16] * plan.num_tiles) for length in (0, 3))
    stream, keys = bare.lengths
    assert (stream > 0, keys > 0) == (description.tiles_in_stream, description.tiles_in_keys)
    assert (tagged.lengths[1] > keys) == description.tags_in_keys


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_code_is_that_of_the_description(configured, name):
    config = configured(f"arch={name}")
    code = registry.build_architecture(config)
    description = registry.description(name)
    assert code.description is description
    assert (code.stream is not None) == description.tiles_in_stream
    assert (code.keys is not None) == description.tiles_in_keys
    assert (code.cross_attention is not None) == bool(description.carried(config.llm))
    assert (description.groups[-1] == "xattn") == bool(description.carried(config.llm))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"arch.name: got 'flamingo', expected one of decoder, xattn, hybrid\. Fix: "):
        registry.description("flamingo")
