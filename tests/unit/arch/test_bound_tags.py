"""What NVLM-H adds to a tile's keys, so that they differ by the tile's place."""

from __future__ import annotations

import itertools

import pytest
import torch

from nvlm.arch.hybrid.fusion import rotated

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
