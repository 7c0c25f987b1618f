"""Which steps count as bad, and the guard's state."""

from __future__ import annotations

import math

import pytest

from nvlm.train.guard import Guard, after, broken, is_bad


def follow(guard: Guard, losses) -> tuple[Guard, list[bool]]:
    verdicts = []
    for loss in losses:
        verdicts.append(is_bad(guard, loss, finite=True))
        guard = after(guard, loss, verdicts[-1])
    return guard, verdicts


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_is_no_number_is_always_bad(loss):
    assert is_bad(Guard(), loss, finite=True)
    assert is_bad(Guard(), 1.0, finite=False)
    assert not is_bad(Guard(), 1e30, finite=True)


def test_a_leap_needs_a_history_and_a_factor():
    assert follow(Guard(3.0), [1.0] * 9 + [100.0])[1] == [False] * 10
    assert follow(Guard(3.0), [1.0] * 10 + [3.0, 3.7])[1] == [False] * 11 + [True]
    assert follow(Guard(0.0), [1.0] * 10 + [100.0])[1] == [False] * 11


def test_bad_steps_leave_the_mean_and_are_counted():
    guard, verdicts = follow(Guard(2.0), [1.0, 2.0] * 6 + [9.0, 9.0, 1.0, 9.0])
    assert verdicts[-4:] == [True, True, False, True]
    assert (guard.good, guard.bad_in_row, guard.skipped) == (13, 1, 3)
    assert guard.mean == pytest.approx(19 / 13)


def test_the_mean_forgets_what_is_long_past():
    guard, _ = follow(Guard(3.0), [9.0] * 50 + [1.0] * 500)
    assert guard.mean == pytest.approx(1.0, abs=1e-3)


def test_its_numbers_restore_it():
    guard, _ = follow(Guard(2.0), [1.0] * 12 + [9.0])
    assert Guard(2.0, **guard.numbers()) == guard


def test_the_message_names_what_one_needs():
    guard, _ = follow(Guard(2.0), [1.0] * 12 + [9.0] * 3)
    text = str(broken(guard, 15, 9.0, 4.5, ["a", "b"]))
    for word in ("step 15", "loss 9", "4.5", "3 bad steps in a row", "a, b", "Fix"):
        assert word in text
