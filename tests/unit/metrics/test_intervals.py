"""Intervals cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from nvlm.metrics import intervals
from nvlm.metrics.intervals import bootstrap, over_seeds, paired, paired_over_seeds, sign_test


def test_an_interval_is_that_of_the_normal_approximation_for_many_questions():
    scores = np.random.default_rng(1).random(400) < 0.7
    found, mean = bootstrap(scores), float(scores.mean())
    half = 1.96 * math.sqrt(mean * (1 - mean) / 400)
    assert found.mean == mean and found.count == 400
    assert found.low == pytest.approx(mean - half, abs=0.004) and found.high == pytest.approx(mean + half, abs=0.004)


@pytest.mark.parametrize(
    "scores", [np.arange(120) % 5 == 0, np.random.default_rng(1).random(120) ** 3], ids=["few", "many"]
)
def test_an_interval_is_scipy_s_bootstrap(scores):
    """Both ways of drawing: few kinds of scores, and as many as questions."""
    theirs = stats.bootstrap((scores,), np.mean, method="percentile", rng=3).confidence_interval
    ours = bootstrap(scores)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.006)


def test_many_questions_are_drawn_in_parts(monkeypatch):
    scores = np.random.default_rng(1).random(50)
    whole = bootstrap(scores)
    monkeypatch.setattr(intervals, "AT_ONCE", 7_000)
    assert bootstrap(scores) == whole


def test_an_interval_is_the_same_each_time_and_needs_a_score():
    assert bootstrap([0, 1, 1]) == bootstrap([0, 1, 1])
    with pytest.raises(ValueError, match="no scores"):
        bootstrap([])


def test_a_difference_is_paired_by_question():
    """Hard and easy questions do not widen it: both runs got the same ones."""
    hard = np.arange(200) % 2
    found = paired(hard + 0.1, hard)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (found.better, found.worse) == (200, 0)
    other = paired([1, 0, 1, 0.5, 0], [0, 1, 0, 0.5, 0])
    assert (other.better, other.worse, other.mean) == (2, 1, pytest.approx(0.2))
    with pytest.raises(ValueError, match="2 and 3 questions"):
        paired([1, 0], [1, 0, 0])


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (3, 3), (0, 6), (14, 5), (480, 401), (5_100, 4_900)])
def test_the_sign_test_is_the_binomial_test(better, worse):
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_test(better, worse) == pytest.approx(expected, rel=1e-9)


def test_an_interval_over_seeds_is_student_s_where_only_seeds_differ():
    scores = [np.full(100, level) for level in (0.4, 0.5, 0.7)]
    low, high = stats.t.interval(0.95, 2, loc=np.mean([0.4, 0.5, 0.7]), scale=stats.sem([0.4, 0.5, 0.7]))
    found = over_seeds(scores, same_questions=True)
    assert found.mean == pytest.approx(1.6 / 3) and found.count == 100
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


def test_an_interval_over_seeds_is_the_bootstrap_s_where_only_questions_differ():
    scores = np.random.default_rng(1).random(300) < 0.6
    assert over_seeds([scores], same_questions=True) == bootstrap(scores)
    assert over_seeds([scores] * 3, same_questions=True).low == pytest.approx(bootstrap(scores).low, abs=1e-9)
    own = over_seeds([scores, ~scores, scores], same_questions=False)
    assert own.count == 900 and own.mean == pytest.approx((1 + scores.mean()) / 3)


def covers(same_questions: bool, rng: np.random.Generator) -> bool:
    """Whether the interval of two equal ways to train, with three seeds that matter, has zero in it."""
    hard = rng.normal(0, 2, (1 if same_questions else 3, 100))
    one, other = (rng.random((3, 100)) < 1 / (1 + np.exp(hard + rng.normal(0, 0.7, (3, 1)))) for _ in range(2))
    found = paired_over_seeds(one, other, same_questions)
    return found.low <= 0 <= found.high


@pytest.mark.parametrize("same_questions", [True, False])
def test_an_interval_over_three_seeds_covers_the_truth(same_questions, monkeypatch):
    """In 95% of cases; resampled seeds would cover it in about 80%."""
    monkeypatch.setattr(intervals, "DRAWS", 1_000)
    rng = np.random.default_rng(1)
    assert sum(covers(same_questions, rng) for _ in range(300)) >= 0.92 * 300


def test_differences_over_seeds_are_those_of_runs_with_the_same_seed():
    first, second = [[1, 1, 0], [1, 0, 1]], [[0, 1, 0], [0, 0, 1]]
    found = paired_over_seeds(first, second, same_questions=True)
    assert (found.mean, found.better, found.worse) == (pytest.approx(1 / 3), 1, 0)
    assert paired_over_seeds(first, second, same_questions=False).better == 2
