"""Token counts of tiles and tags, with the published numbers."""

from __future__ import annotations

import pytest

from nvlm.tiling import TilePlan, plan_tiles, tokens_per_tile
from nvlm.tiling.budget import ImageTokens, image_tokens, regular_tokens, thumbnail_tokens


def test_a_tile_is_256_tokens():
    assert tokens_per_tile() == 256
    assert tokens_per_tile(448, 14, 1) == 1024
    assert tokens_per_tile(56, 14, 2) == 4


@pytest.mark.parametrize("sizes", [(450, 14, 2), (448, 15, 2), (448, 14, 3)])
def test_sizes_must_divide(sizes):
    with pytest.raises(ValueError, match=rf"tile_size, got {sizes[0]}, expected a multiple of"):
        tokens_per_tile(*sizes)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ((0, 14, 2), "tile_size, got 0"),
        ((448, 0, 2), "patch_size, got 0"),
        ((448, 14, -2), "downsample, got -2"),
    ],
)
def test_sizes_must_be_positive(sizes, complaint):
    with pytest.raises(ValueError, match=f"{complaint}, expected a positive number, fix: "):
        tokens_per_tile(*sizes)


def test_the_largest_image_of_the_decoder_is_1827_tokens():
    tokens = image_tokens(plan_tiles(640, 480), 256, [5] * 7)
    assert tokens == ImageTokens(tiles=1792, tags=35)
    assert tokens.total == 7 * (256 + 5) == 1827


def test_parts_of_an_image():
    plan = TilePlan(2, 1)
    lengths = [5, 6, 9]
    assert regular_tokens(plan, 256, lengths) == ImageTokens(512, 11)
    assert thumbnail_tokens(plan, 256, lengths) == ImageTokens(256, 9)
    assert image_tokens(plan, 256, lengths) == ImageTokens(768, 20)


def test_a_1x1_image_is_all_thumbnail():
    plan = TilePlan(1, 1)
    assert regular_tokens(plan, 256, [5]) == ImageTokens(0, 0)
    assert thumbnail_tokens(plan, 256, [5]) == image_tokens(plan, 256, [5]) == ImageTokens(256, 5)


@pytest.mark.parametrize("count", [image_tokens, regular_tokens, thumbnail_tokens])
@pytest.mark.parametrize("lengths", [[], [5] * 6, [5] * 8])
def test_every_tile_has_a_tag_length(count, lengths):
    with pytest.raises(ValueError, match=rf"tag lengths, got {len(lengths)}, expected 7, .* 3x2 grid"):
        count(TilePlan(3, 2), 256, lengths)
