"""Dropout by place: its rate, and that it depends only on place, linear and feature."""

from __future__ import annotations

import pytest
import torch

from nvlm.data.batch import places_of
from nvlm.llm.dropout import dropped

S, B, F = 64, 48, 96
PLACES_SB = places_of(3, range(B), S).t()


def mask(rate: float = 0.5, linear: int = 7, place_SB: torch.Tensor = PLACES_SB, first: int = 0) -> torch.Tensor:
    """Which elements are kept [S, B, F]."""
    return dropped(torch.ones(*place_SB.shape, F), rate, linear, place_SB, first) != 0


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_the_share_is_the_rate_along_every_dimension_and_the_mean_stays(rate):
    x_SBF = torch.rand(S, B, F) + 0.5
    out_SBF = dropped(x_SBF, rate, 7, PLACES_SB, 0)
    kept_SBF = out_SBF != 0
    assert torch.allclose(out_SBF[kept_SBF], (x_SBF / (1 - rate))[kept_SBF])
    share = 1 - kept_SBF.double().mean()
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(share - rate) < 5 * deviation / (S * B * F) ** 0.5
    for dims in ((0, 1), (0, 2), (1, 2)):  # five deviations of the mean of each feature, row and column
        shares = 1 - kept_SBF.double().mean(dim=dims)
        assert (shares - rate).abs().max() < 5 * deviation / (S * B * F / len(shares)) ** 0.5


def test_masks_of_other_linears_steps_rows_columns_and_features_are_independent():
    kept_SBF = mask()
    others = {
        "linear": mask(linear=8),
        "distant linear": mask(linear=2**32 - 5),
        "step": mask(place_SB=places_of(4, range(B), S).t()),
        "row": kept_SBF.roll(1, 1),
        "column": kept_SBF.roll(1, 0),
        "feature": kept_SBF.roll(1, 2),
    }
    for name, other_SBF in others.items():
        agree = float((kept_SBF == other_SBF).double().mean())
        assert abs(agree - 0.5) < 5 * 0.5 / (S * B * F) ** 0.5, name


def test_a_part_has_the_mask_of_the_whole():
    kept_SBF = mask()
    rows, columns = [5, 31, 2], slice(16, 48)
    part_SBF = dropped(torch.ones(32, 3, F // 4), 0.5, 7, PLACES_SB[columns][:, rows], first=F // 2) != 0
    assert torch.equal(part_SBF, kept_SBF[columns][:, rows, F // 2 : 3 * F // 4])


def test_places_are_told_apart_over_steps_rows_and_columns():
    places = torch.stack([places_of(step, range(40), 100) for step in (0, 1, 2**23 - 1)])
    assert places.unique().numel() == places.numel() and int(places.min()) >= 0
