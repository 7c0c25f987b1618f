"""Kernels and passes over memory as benchmarks/kernel_counts.py counts them, and those of an encoder layer."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.kernel_counts import Counting, once
from benchmarks.launches import encoder_layer

ROWS, WIDTH = 6, 8
SIZE = 4 * ROWS * WIDTH  # bytes


def test_views_are_free_and_products_apart():
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH)
    with Counting() as mode:
        y = x.view(-1, 2).view_as(x)  # nothing
        y = (y @ weight) + 1  # a product; one read and one write
        y.t().contiguous()  # the same
        y.add_(x)  # reads both, writes one
        torch.empty(3).zero_()  # only writes
    assert mode.count.launches == {"products": 1, "other": 4}
    assert mode.count.bytes == (2 + 2 + 3) * SIZE + 4 * 3


def gated(x, y):
    return torch.tanh(x) * y + 1


def test_a_compiled_function_is_one_kernel_in_each_direction():
    x, y = (torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(gated(x, y).sum(), (x, y))
    with Counting() as mode:
        out = once(gated, "compiled")(x, y)
    assert mode.count.launches == {"compiled": 1} and mode.count.bytes == 3 * SIZE
    with Counting() as mode:
        out.backward(torch.ones_like(out))
    assert mode.count.launches == {"compiled": 1, "other": 1}  # the other fills the ones
    assert mode.count.bytes == (1 + 1 + 2 + 2) * SIZE
    torch.testing.assert_close((x.grad, y.grad), expected)


def test_the_gradient_of_an_addition_is_no_kernel():
    x, y = (torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2))
    ones = torch.ones(ROWS, WIDTH)
    with Counting() as mode:
        out = once(torch.add, "compiled")(x, y)
        of_x, of_y = torch.autograd.grad(out, (x, y), ones)
    assert mode.count.launches == {"compiled": 1} and torch.equal(of_x, ones) and torch.equal(of_y, ones)


def test_a_norm_copies_what_is_not_contiguous():
    x = torch.randn(WIDTH, ROWS).t()
    with Counting() as mode:
        once(nn.functional.rms_norm, copies=True)(x, (WIDTH,))
    assert mode.count.launches == {"other": 2} and mode.count.bytes == 4 * SIZE


def test_an_encoder_layer_makes_few_passes(megatron):
    assert encoder_layer().line() == {
        "layer": "encoder, forward", "launches": 9, "products": 4, "attention": 1, "compiled": 3, "other": 1,
        "passes": 20.0,
    }  # fmt: skip
