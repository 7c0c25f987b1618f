"""Prompts of like length share batches that fit, and replicas get equal work."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from nvlm.evaluate.order import Prompt, batches, share

PROMPTS = st.lists(st.tuples(st.integers(1, 900), st.integers(0, 900), st.integers(0, 7)), max_size=60).map(
    lambda lengths: [Prompt(number, *one) for number, one in enumerate(lengths)]
)


def width(batch, new):
    return max(one.columns for one in batch) + max(one.keys for one in batch) + new


@given(PROMPTS, st.integers(1, 20), st.integers(20, 5000), st.integers(1, 50))
def test_each_prompt_is_in_one_batch_that_fits(prompts, rows, tokens, new):
    found = batches(share(prompts, 0, 1), rows, tokens, new)
    assert sorted(one.index for batch in found for one in batch) == list(range(len(prompts)))
    for batch in found:
        assert len(batch) == 1 or (len(batch) <= rows and len(batch) * width(batch, new) <= tokens)


@given(PROMPTS, st.integers(1, 5))
def test_replicas_share_the_prompts_evenly(prompts, replicas):
    parts = [share(prompts, replica, replicas) for replica in range(replicas)]
    assert sorted(one.index for part in parts for one in part) == list(range(len(prompts)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    longest = max((one.columns + one.keys for one in prompts), default=0)
    work = [sum(one.columns + one.keys for one in part) for part in parts]
    assert max(work) - min(work) <= longest


def test_sorting_saves_padding():
    shuffled = [
        Prompt(number, length, 0, 0) for number, length in enumerate(random.Random(0).sample(range(1, 401), 400))
    ]
    padded = {
        name: sum(len(batch) * max(one.columns for one in batch) for batch in batches(prompts, 40, 10**6, 0))
        for name, prompts in (("as they come", shuffled), ("sorted", share(shuffled, 0, 1)))
    }
    real = sum(one.columns for one in shuffled)
    assert padded["sorted"] < 1.12 * real < 1.7 * real < padded["as they come"]


def test_one_long_prompt_does_not_take_the_others_along():
    prompts = [Prompt(0, 4000, 0, 0), *(Prompt(number, 100, 0, 0) for number in range(1, 41))]
    assert [len(batch) for batch in batches(share(prompts, 0, 1), 40, 4500, 10)] == [1, 40]
