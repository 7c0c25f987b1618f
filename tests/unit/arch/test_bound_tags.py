"""What NVLM-H adds to a tile's keys, so that they differ by the tile's place."""

from __future__ import annotations

import itertools

import pytest
import torch

from nvlm.arch.hybrid.fusion import rotated
from nvlm.commands.compose import compose_config
from nvlm.data.text.tokenizer import tokenizer_of
from nvlm.tiling.grid import TilePlan
from nvlm.tiling.tags import tile_tags

NUMBERS = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))  # an embedding for each digit


def means(tags: list[tuple[int, ...]], ordered: bool) -> torch.Tensor:
    """[P, H]: the mean of each tag's words."""
    words_PLH = NUMBERS[torch.tensor(tags)]
    return (rotated(words_PLH) if ordered else words_PLH).mean(dim=1)


def least_distance(means_PH: torch.Tensor) -> float:
    return min(float((a - b).norm()) for a, b in itertools.combinations(means_PH, 2))


@pytest.mark.parametrize("ordered", [True, False])
def test_places_with_the_same_numbers_differ_only_if_order_counts(ordered):
    """As in <tile_x0_y1> and <tile_x1_y0>."""
    grid = [(5, x, 6, y) for x in range(3) for y in range(3)]
    assert (least_distance(means(grid, ordered)) > 0.3) == ordered


def most_alike(style: str, ordered: bool) -> float:
    """The largest cosine of two tags of one image, over all grids of up to 6 tiles, with random word embeddings."""
    tokenizer = tokenizer_of(compose_config("arch=hybrid").llm)
    words_VH = torch.randn(600, 128, generator=torch.Generator().manual_seed(0))
    found = []
    for cols, rows in itertools.product(range(1, 7), repeat=2):
        if not 1 < cols * rows <= 6:
            continue
        tags = [words_VH[list(tokenizer.encode(tag))] for tag in tile_tags(TilePlan(cols, rows, 112), style)[:-1]]
        bound = [(rotated(tag[None])[0] if ordered else tag).mean(dim=0) for tag in tags]
        found += [float(torch.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(bound, 2)]
    return max(found)


@pytest.mark.parametrize(("style", "most"), [("1d", 0.75), ("2d_grid", 0.92), ("2d_bbox", 0.95)])
def test_no_two_tags_of_an_image_are_nearly_the_same(style, most):
    assert most_alike(style, ordered=True) < most


@pytest.mark.parametrize("style", ["2d_grid", "2d_bbox"])
def test_without_order_some_2d_tags_of_an_image_are_the_same(style):
    assert most_alike(style, ordered=False) == pytest.approx(1)


def test_the_first_word_is_as_it_was_and_lengths_stay():
    words_PLH = NUMBERS[torch.tensor([[1, 2, 3]])]
    turned = rotated(words_PLH)
    assert torch.equal(turned[:, 0], words_PLH[:, 0])
    torch.testing.assert_close(turned.norm(dim=2), words_PLH.norm(dim=2))
    assert (turned[0, 1:] - words_PLH[0, 1:]).norm(dim=1).min() > 1


def test_rotation_keeps_the_precision_of_its_input():
    words_PLH = NUMBERS[torch.tensor([[1, 2, 3]])]
    rounded = rotated(words_PLH.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), rotated(words_PLH), atol=0.04, rtol=0)
