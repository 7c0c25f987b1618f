"""Means, intervals and differences of cells, on scores whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from nvlm.report.compare import Gap, adjusted, gap, interval

NAMES = (("a", "1d"), ("a", "none"))


def scores(seed: int, values, prefix="q") -> dict[int, dict[str, float]]:
    return {seed: {f"{prefix}{number}": float(value) for number, value in enumerate(values)}}


def test_each_seed_has_the_same_weight():
    found = interval(scores(1, [1, 1, 1, 1]) | scores(2, [0, 0], "other"))
    assert found.mean == 0.5 and found.count == 6
    assert found.low < 0.5 < found.high


def test_an_interval_over_questions_is_that_of_a_mean_of_zeros_and_ones():
    found = interval(scores(1, [1] * 80 + [0] * 20))
    width = 2 * 1.96 * np.sqrt(0.8 * 0.2 / 100)
    assert found.high - found.low == pytest.approx(width, rel=0.1)


def test_seeds_that_differ_widen_the_interval_and_more_questions_do_not_help():
    rng = np.random.default_rng(0)

    def width(rates, questions):
        return_ = interval({s: scores(s, rng.random(questions) < rate)[s] for s, rate in enumerate(rates)})
        return return_.high - return_.low

    alike, apart = width([0.8, 0.8, 0.8, 0.8], 2000), width([0.7, 0.8, 0.8, 0.9], 2000)
    assert apart > 3 * alike
    assert width([0.7, 0.8, 0.8, 0.9], 8000) > 0.7 * apart


def test_shared_questions_are_resampled_together():
    """Three seeds with the same answers say no more than one; three with other questions do."""
    values = [1] * 60 + [0] * 40
    one, shared = interval(scores(1, values)), interval({s: scores(s, values)[s] for s in (1, 2, 3)})
    own = interval({s: scores(s, values, f"s{s}-")[s] for s in (1, 2, 3)})
    assert shared.high - shared.low == pytest.approx(one.high - one.low, rel=0.1)
    assert own.high - own.low < 0.75 * (one.high - one.low)


def test_a_difference_is_this_minus_base_on_common_questions_and_seeds():
    this = scores(1, [1, 1, 1, 1, 0]) | scores(3, [0])
    base = scores(1, [1, 0, 0, 0]) | scores(2, [1, 1])
    found = gap(this, base, NAMES)
    assert (found.mean, found.better, found.worse, found.count, found.seeds) == (0.75, 3, 0, 4, 1)
    assert found.p == pytest.approx(2 / 2**3)
    assert found.partial
    back = gap(base, this, NAMES)
    assert (back.mean, back.better, back.worse) == (-0.75, 0, 3)


def test_pairing_removes_what_both_share():
    """Hard questions are hard for both, so the difference is far more certain than the scores."""
    easy = np.random.default_rng(1).random(400) < 0.5
    base, this = scores(1, easy), scores(1, [*easy[:-20], *[True] * 20])
    found, alone = gap(this, base, NAMES), interval(base)
    assert 0 < found.low and found.high - found.low < 0.5 * (alone.high - alone.low)


def test_cells_without_common_questions_are_not_compared():
    assert gap(scores(1, [1]), scores(2, [1]), NAMES) is None
    assert gap(scores(1, [1], "a"), scores(1, [1], "b"), NAMES) is None
    assert interval({}) is None


def made(p: float, low=0.1) -> Gap:
    return Gap(this=NAMES[0], base=NAMES[1], mean=0.2, low=low, high=0.3, count=9, seeds=1, better=5, worse=1, p=p)


def test_holm_s_adjustment():
    """Holm (1979): the smallest p times n, the next times n - 1, never below those before; at most 1."""
    assert [one.holm for one in adjusted([made(0.01), made(0.04), made(0.03), made(0.005)])] == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )
    assert [one.holm for one in adjusted([made(0.9), made(0.8)])] == [1.0, 1.0]


def test_certain_needs_both_the_interval_and_the_test():
    sure, wide, many = adjusted([made(0.001), made(0.001, low=-0.1), made(0.04)])
    assert sure.certain and not wide.certain
    assert many.certain  # adjusted p is 0.04
    assert not adjusted([made(0.03), made(0.04)])[0].certain
