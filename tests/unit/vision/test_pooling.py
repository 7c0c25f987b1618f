"""Poolings: literal maps, and the counts that the configuration foretells."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nvlm.tiling.grid import POOLS, pooled_side
from nvlm.vision.pooling import by_columns, pixel_shuffle, pooled, pooled_to

FOUR = torch.arange(16.0).view(1, 16, 1)  # a map of 4 x 4 whose values are the patches' numbers
THREE = torch.arange(9.0).view(1, 9, 1)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("average", [2.5, 4.5, 10.5, 12.5]),
        ("max", [5, 7, 13, 15]),
        ("bilinear", [2.5, 4.5, 10.5, 12.5]),  # at half the size, the middle of a block
        ("concat", [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
    ],
)
def test_blocks_of_an_even_map(pool, expected):
    assert pooled(FOUR, 2, pool)[0].squeeze(-1).tolist() == expected


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("average", [2.0]),  # of 0, 1, 3, 4: the last row and column fill no block
        ("max", [4.0]),
        # Rounded up to 2 x 2: sampled at 0.25 and 1.75 on each axis, whose patches are 0, 1 and 2.
        ("bilinear", [1.0, 2.5, 5.5, 7.0]),
        ("concat", [[0, 1, 3, 4], [2, 0, 5, 0], [6, 7, 0, 0], [8, 0, 0, 0]]),
    ],
)
def test_blocks_of_an_odd_map(pool, expected):
    assert pooled(THREE, 2, pool, pads=pool == "concat")[0].squeeze(-1).tolist() == expected


def test_blocks_of_nine():
    grid = torch.arange(25.0).view(1, 25, 1)
    first, _, third, last = pooled(grid, 3, "concat", pads=True)[0].tolist()
    assert first == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert third == [15, 16, 17, 20, 21, 22, 0, 0, 0] and last == [18, 19, 0, 23, 24, 0, 0, 0, 0]


@pytest.mark.parametrize("side", [4, 7, 27])
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("pool", POOLS)
def test_counts_are_those_foretold(pool, factor, side):
    x = torch.randn(2, side * side, 3, generator=torch.Generator().manual_seed(side))
    got = pooled(x, factor, pool, pads=pool == "concat")
    to = pooled_side(side, factor, pool, pads=pool == "concat")
    assert got.shape == (2, to * to, 3 * (factor**2 if pool == "concat" else 1))
    if pool == "concat":  # every value once, and zeros
        assert torch.equal(got.flatten().sort()[0], F.pad(x.flatten(), (0, got.numel() - x.numel())).sort()[0])


@pytest.mark.parametrize("side", [8, 27])
def test_bilinear_is_that_of_transformers(side):
    """LlavaOnevisionModel.apply_pooling of transformers, and get_2dPool of LLaVA-NeXT with its stride of 2."""
    from types import SimpleNamespace

    from transformers import LlavaOnevisionModel

    x = torch.randn(2, side * side, 5, generator=torch.Generator().manual_seed(0))
    sizes = SimpleNamespace(vision_config=SimpleNamespace(image_size=side * 14 + 6, patch_size=14))
    expected = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=sizes), x)
    torch.testing.assert_close(pooled(x, 2, "bilinear"), expected)


def test_average_is_that_of_transformers():
    """The pooler of LlavaNextVideo, whose spatial_pool_mode is average by default; max is its other one."""
    from types import SimpleNamespace

    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

    x = torch.randn(2, 49, 5, generator=torch.Generator().manual_seed(0))
    for mode in ("average", "max"):
        vision = SimpleNamespace(image_size=98, patch_size=14, hidden_size=5)
        sizes = SimpleNamespace(spatial_pool_mode=mode, spatial_pool_stride=2, vision_config=vision)
        torch.testing.assert_close(pooled(x, 2, mode), LlavaNextVideoPooler(sizes)(x))


@pytest.mark.parametrize("pool", POOLS)
def test_gradients_are_those_of_the_arithmetic(pool):
    x = torch.randn(2, 9, 2, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: pooled(x, 2, pool, pads=pool == "concat"), (x,))


def test_blocks_are_the_smallest_with_so_many_tokens():
    x = torch.randn(2, 27 * 27, 3, generator=torch.Generator().manual_seed(0))
    assert pooled_to(x, 729, "none") is x
    assert torch.equal(pooled_to(x, 196, "bilinear"), pooled(x, 2, "bilinear"))
    assert torch.equal(pooled_to(x, 36, "average"), pooled(x, 4, "average"))
    for tokens, pool in ((196, "average"), (169, "bilinear"), (196, "none"), (730, "max")):
        with pytest.raises(ValueError, match=f"features of a tile: got 729 tokens, expected {tokens}"):
            pooled_to(x, tokens, pool)


def test_what_is_no_grid_is_refused():
    with pytest.raises(ValueError, match="got 8 patches, expected a square grid"):
        pooled(torch.ones(1, 8, 2), 2, "average")
    with pytest.raises(ValueError, match="pixel_shuffle: got 9 patches, expected a square grid with sides divisible"):
        pixel_shuffle(THREE, 2)
    with pytest.raises(ValueError, match="got 3 patches per side, expected a multiple of 2, fix: pad with zeros"):
        pooled(THREE, 2)


def test_tokens_stand_by_columns_as_in_vila():
    tokens = pooled(FOUR, 2, "concat")
    assert by_columns(tokens)[0].tolist() == [[0, 1, 4, 5], [8, 9, 12, 13], [2, 3, 6, 7], [10, 11, 14, 15]]
