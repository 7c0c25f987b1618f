"""Who attends to whom, written out: `x` sees, `.` does not. Rows are queries, columns are keys."""

from __future__ import annotations

import pytest
import torch

from nvlm.attention.kernel import CoreAttention, View
from nvlm.attention.kernels.dense import DENSE
from nvlm.attention.visibility import causal_mask, visible
from nvlm.data.batch import ALL_TILES, OF_LATEST, PAD


def matrix(*rows: str) -> torch.Tensor:
    return torch.tensor([[sign == "x" for sign in row.replace(" ", "")] for row in rows])


def numbers(*tokens: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    """(sample, image, tile) of each token as three tensors."""
    return tuple(torch.tensor(column) for column in zip(*tokens))


def test_tags_of_x_see_their_tile_and_text_sees_the_images_begun():
    stream = [
        (0, PAD, ALL_TILES),  # text before any image
        (0, 0, 0),  # image 0: the tags of two tiles and of the thumbnail
        (0, 0, 1),
        (0, 0, 2),
        (0, 0, ALL_TILES),  # text between
        (0, 1, 0),  # image 1: the tag of its one tile
        (0, 1, ALL_TILES),
    ]
    keys = [(0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)]  # tile 0 has two tokens here
    expected = matrix(
        ".. . . .",
        "xx . . .",
        ".. x . .",
        ".. . x .",
        "xx x x .",
        ".. . . x",
        "xx x x x",
    )
    assert torch.equal(visible(*numbers(*stream), *numbers(*keys)), expected)


def test_the_same_tile_number_of_an_earlier_image_is_not_the_own_tile():
    stream = [(0, 2, 1), (0, 1, 1), (0, 0, 1)]
    keys = [(0, 0, 1), (0, 1, 1), (0, 2, 1), (0, 2, 0)]
    assert torch.equal(visible(*numbers(*stream), *numbers(*keys)), matrix("..x.", ".x..", "x..."))


def test_with_the_latest_image_alone_earlier_ones_are_hidden_and_tags_keep_their_tile():
    stream = [(0, PAD, OF_LATEST), (0, 0, 1), (0, 0, OF_LATEST), (0, 1, 0), (0, 1, OF_LATEST), (1, 1, OF_LATEST)]
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 2, 0), (1, 0, 0), (PAD, PAD, PAD)]
    expected = matrix("......", ".x....", "xx....", "..x...", "..x...", "......")
    assert torch.equal(visible(*numbers(*stream), *numbers(*keys)), expected)


def test_samples_of_a_row_do_not_see_each_others_tiles():
    stream = [(0, 0, ALL_TILES), (1, PAD, ALL_TILES), (1, 0, ALL_TILES), (1, 0, 0), (2, 5, ALL_TILES)]
    keys = [(0, 0, 0), (1, 0, 0), (1, 0, 1), (3, 0, 0)]
    expected = matrix("x...", "....", ".xx.", ".x..", "....")
    assert torch.equal(visible(*numbers(*stream), *numbers(*keys)), expected)


def test_padding_sees_nothing_and_is_not_seen():
    """Padding of the stream and of the keys has the same numbers, but they must not see each other."""
    stream = [(0, 0, ALL_TILES), (PAD, PAD, ALL_TILES)]
    keys = [(0, 0, 0), (PAD, PAD, PAD)]
    assert torch.equal(visible(*numbers(*stream), *numbers(*keys)), matrix("x.", ".."))


def test_rows_of_a_batch_are_told_apart():
    none = (PAD, PAD, ALL_TILES)
    first, second = [(0, 0, ALL_TILES), none], [(0, PAD, ALL_TILES), (0, 0, 1)]
    stream = [torch.stack(parts) for parts in zip(numbers(*first), numbers(*second))]
    keys = [torch.stack(parts) for parts in zip(numbers((0, 0, 0), (0, 0, 1)), numbers((0, 0, 1), (0, 0, 0)))]
    assert torch.equal(visible(*stream, *keys), torch.stack([matrix("xx", ".."), matrix("..", "x.")]))


def test_a_row_without_keys():
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert visible(*[torch.zeros(2, 3, dtype=torch.long)] * 3, empty, empty, empty).shape == (2, 3, 0)


def test_causal_mask_of_packed_rows():
    columns = torch.arange(6)
    unseen = causal_mask(torch.tensor([[0, 0, 0, 1, 1, PAD], [0, 1, 2, 2, 2, 2]]), columns, columns)
    expected = [
        matrix("x.....", "xx....", "xxx...", "...x..", "...xx.", "......"),
        matrix("x.....", ".x....", "..x...", "..xx..", "..xxx.", "..xxxx"),
    ]
    assert unseen.shape == (2, 1, 6, 6)
    assert torch.equal(~unseen[:, 0], torch.stack(expected))


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients():
    config = type("Config", (), {"context_parallel_size": 1})()
    query, key, value = (torch.randn(3, 1, heads, 4, requires_grad=True) for heads in (2, 1, 1))
    unseen = ~matrix("x..", "...", "xxx")[None, None]
    out = CoreAttention(config)(query, key, value, View(DENSE, unseen))
    assert out.shape == (3, 1, 8) and (out[1] == 0).all()
    assert torch.allclose(out[0, 0], value[0, 0, 0].repeat(2))
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))
    assert query.grad[1].abs().max() == 0 and value.grad[1].abs().max() > 0


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("hidden", [None, [[True, False, False, True, False], [True] * 5]], ids=["all seen", "masked"])
def test_one_column_attends_as_the_last_of_many(groups, hidden):
    """By group instead of by head; the second row sees no key."""
    query, key, value = (torch.randn(length, 2, heads, 6) for length, heads in ((3, 4), (5, groups), (5, groups)))
    unseen = None if hidden is None else torch.tensor(hidden)[:, None, None]
    many = DENSE.attend(query, key, value, None if unseen is None else unseen.expand(2, 1, 3, 5), scale=0.3)
    one = DENSE.attend(query[-1:], key, value, unseen, scale=0.3)
    assert one.shape == (1, 2, 24)
    torch.testing.assert_close(one, many[-1:], rtol=0, atol=1e-6)
    assert hidden is None or (one[0, 1] == 0).all()
