"""Intervals cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nvlm.metrics.intervals import bootstrap


def test_an_interval_is_that_of_the_normal_approximation_for_many_questions():
    scores = np.random.default_rng(1).random(400) < 0.7
    found, mean = bootstrap(scores), float(scores.mean())
    half = 1.96 * math.sqrt(mean * (1 - mean) / 400)
    assert found.mean == mean and found.count == 400
    assert found.low == pytest.approx(mean - half, abs=0.004) and found.high == pytest.approx(mean + half, abs=0.004)


def test_an_interval_is_the_same_each_time_and_needs_a_score():
    assert bootstrap([0, 1, 1]) == bootstrap([0, 1, 1])
    with pytest.raises(ValueError, match="no scores"):
        bootstrap([])
