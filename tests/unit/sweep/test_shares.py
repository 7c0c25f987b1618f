"""Cores and GPUs divided among runs side by side."""

from __future__ import annotations

import pytest

from nvlm.config.values import ConfigError
from nvlm.sweep.shares import MEMORY, Share, Wish, divide

PLENTY = 1e15
SIX = [Wish(1, None)] * 6


@pytest.mark.parametrize(
    ("cores", "gpus", "wishes", "jobs", "expected"),
    [
        ([0, 1], "", SIX, None, [Share((0,)), Share((1,))]),
        ([0, 1], "", SIX, 1, [Share((0, 1))]),
        ([2, 3, 5], "", SIX, 2, [Share((2,)), Share((3, 5))]),
        ([0, 1, 2, 3], "", [Wish(1, 2)] * 3, None, [Share((0, 1)), Share((2, 3))]),
        ([0, 1, 2, 3], "", [Wish(2, None)] * 3, None, [Share((0, 1)), Share((2, 3))]),
        ([0, 1], "", [Wish(1, 8)] * 3, None, [Share((0, 1))]),  # wants more than there is
        (range(8), "", SIX[:2], None, [Share((0, 1, 2, 3)), Share((4, 5, 6, 7))]),  # no more shares than runs
        (range(4), "67", SIX, None, [Share((0, 1), ("6",)), Share((2, 3), ("7",))]),
        (range(2), "0123", [Wish(1, None), Wish(2, None)], None, [Share((0,), ("0", "1")), Share((1,), ("2", "3"))]),
        ([4], "01", SIX, None, [Share((4,), ("0",)), Share((4,), ("1",))]),
    ],
)  # fmt: skip
def test_shares(cores, gpus, wishes, jobs, expected):
    assert divide(cores, tuple(gpus), PLENTY, wishes, jobs) == expected


def test_memory_limits_the_default_alone():
    assert len(divide(range(64), (), 4.5 * MEMORY, [Wish(1, None)] * 64, None)) == 4
    assert len(divide(range(64), (), 0.1 * MEMORY, [Wish(1, None)] * 64, None)) == 1
    assert len(divide(range(64), (), 4.5 * MEMORY, [Wish(1, None)] * 64, 7)) == 7


@pytest.mark.parametrize(("gpus", "jobs"), [("", 0), ("", 3), ("01", 3)])
def test_too_many_jobs_are_refused(gpus, jobs):
    with pytest.raises(ConfigError, match=rf"jobs: got {jobs}, expected 1 to 2, for the 2 .* here. Fix: jobs=2"):
        divide([0, 1], tuple(gpus), PLENTY, SIX, jobs)


def test_threads_are_divided_among_the_processes_of_a_run():
    assert Share((0, 1, 2, 3)).environment(2) == {"OMP_NUM_THREADS": "2"}
    assert Share((0,), ("3", "4")).environment(2) == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "3,4"}
