"""Gradients of a sum of losses become those of the mean, clipped."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from nvlm.train.optim import update

TOKENS = 7


@pytest.mark.parametrize("clip", [0.0, 0.1, 100.0])
def test_an_update_gets_the_clipped_gradients_of_the_mean(clip):
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in ((3, 4), (5,), (2,))]
    for parameter in parameters[:2]:  # the last one has none on this rank
        parameter.grad = TOKENS * torch.randn_like(parameter)
    expected = [torch.nn.Parameter(parameter.detach()) for parameter in parameters[:2]]
    for one, parameter in zip(expected, parameters):
        one.grad = parameter.grad / TOKENS
    norm = TOKENS * float(torch.cat([one.grad.flatten() for one in expected]).norm())
    stepped = []
    optimizer = SimpleNamespace(
        config=SimpleNamespace(clip_grad=clip),
        get_parameters=lambda: parameters,
        step_with_ready_grads=lambda: stepped.extend(p.grad for p in parameters[:2]),
    )
    update(optimizer, norm, TOKENS)
    if clip:
        clip_grad_norm_(expected, clip)
    for got, one in zip(stepped, expected, strict=True):
        torch.testing.assert_close(got, one.grad, rtol=1e-6, atol=0)
