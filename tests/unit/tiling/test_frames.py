"""Frames whose tokens are pooled before the projector: the tiles themselves have fewer tokens."""

from __future__ import annotations

import pytest

from nvlm.arch.registry import placement_rule
from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.data.outline import build_processor
from nvlm.data.plans import place
from nvlm.tiling.frames import FrameTiling


@pytest.mark.parametrize(
    ("pool", "slow_every", "each", "expected"),
    [
        ("none", 0, 729, [729, 729, 729]),
        ("average", 0, 576, [144, 144, 144]),
        ("average", 0, 729, [169, 169, 169]),
        ("bilinear", 0, 729, [196, 196, 196]),
        ("bilinear", 2, 729, [196, 49, 196]),
    ],
)
def test_tokens_of_frames(pool, slow_every, each, expected):
    rule = FrameTiling(tile_size=384, pool=pool, before=True, slow_every=slow_every)
    assert rule.of(3).tokens(each) == expected
    later = FrameTiling(tile_size=384, pool=pool, slow_every=slow_every)
    assert later.of(3).tokens(each) == [each] * 3 and rule.pooled(1, 27) is None
    sizes = [later.pooled(frame, round(each**0.5)) for frame in range(3)]
    assert [each if size is None else size.size[0] * size.size[1] for size in sizes] == expected


def test_a_video_has_as_many_tokens_before_and_after_the_projector():
    words = ("arch=decoder", "video.pool=average", "video.separator=row")
    placed = []
    for before in ("true", "false"):
        config = compose_config(*words, f"video.before_projector={before}")
        processor = build_processor(config, placement_rule("decoder"))
        placed.append(place(processor, processor.frames.of(2)))
    before, after = placed
    assert before.tile_tokens == (4, 4) and after.tile_tokens == (16, 16)
    assert before.lengths == after.lengths == (2 * 2 * 3, 0)  # two rows of two tokens and their end, twice


def test_nothing_is_pooled_before_the_projector_without_a_pool():
    with pytest.raises(ConfigError, match="video.before_projector: got True, expected false with video.pool=none"):
        compose_config("video.before_projector=true")
