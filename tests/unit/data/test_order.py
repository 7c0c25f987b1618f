"""The order of records: permutations without memory, exact shares of sources, and replicas that see them all."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import chain, permutations

import numpy as np
import pytest

from nvlm.data.order import Drawn, Order, permuted, scheduled, taken
from nvlm.data.pack import hand_out

SHARES = (0.5, 0.3, 0.2)
BLEND = Order(7, 40, tuple(Drawn(name, count, share) for name, count, share in zip("abc", (900, 70, 3000), SHARES)))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 1000, 4097])
def test_every_number_comes_once(count):
    found = permuted(np.arange(count), count, (1, 2, 3))
    assert sorted(found.tolist()) == list(range(count))
    assert permuted(np.arange(count)[::-1], count, (1, 2, 3)).tolist() == found[::-1].tolist()


@pytest.mark.parametrize("count", [3, 4])
def test_all_permutations_of_few_are_about_equally_frequent(count):
    draws = 3000
    found = Counter(tuple(permuted(np.arange(count), count, (seed,)).tolist()) for seed in range(draws))
    assert found.keys() == set(permutations(range(count)))
    expected = draws / len(found)
    # Chi-squared with at most 23 degrees of freedom is above 60 once in 30,000 times.
    assert sum((times - expected) ** 2 / expected for times in found.values()) < 60


def test_a_billion_records_take_no_memory():
    tracemalloc.start()
    found = permuted(np.arange(5000), 10**9, (4,))
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    assert len(set(found.tolist())) == 5000 and 0 <= found.min() and 0.9e9 < found.max() < 1e9
    assert abs(np.corrcoef(np.arange(5000), found)[0, 1]) < 0.08  # five standard deviations


def test_a_single_source_is_drawn_epoch_by_epoch():
    order = Order(7, 6, (Drawn("", 20),))
    seen = [record for step in range(10) for record in order.step(step)]
    assert Counter(seen) == dict.fromkeys(range(20), 3)
    first, second = (replace(order, global_batch=20).step(step) for step in range(2))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert replace(order, seed=8).step(0) != order.step(0) and order.step(4) == order.step(4)


@pytest.mark.parametrize("shares", [(1.0,), SHARES, (0.98, 0.02), tuple(np.arange(1, 31) / np.arange(1, 31).sum())])
def test_shares_are_exact_at_every_draw_and_any_part_of_the_schedule_comes_out_alone(shares):
    source, draw = scheduled(shares, 0, 3000)
    counts = np.stack([np.cumsum(source == number) for number in range(len(shares))], axis=1)
    assert np.abs(counts - np.outer(np.arange(1, 3001), shares)).max() < 1
    for number in range(len(shares)):  # no draw is left out or repeated
        assert draw[source == number].tolist() == list(range(int(counts[-1, number])))
    for first, count in ((0, 1), (17, 40), (2960, 40)):
        again = scheduled(shares, first, count)
        assert again[0].tolist() == source[first : first + count].tolist()
        assert again[1].tolist() == draw[first : first + count].tolist()


def test_each_epoch_of_a_source_has_all_its_records():
    seen = Counter(chain.from_iterable(BLEND.step(step) for step in range(250)))
    by_source = [Counter(record for record in seen.elements() if BLEND.source(record) == k) for k in range(3)]
    assert [sum(found.values()) for found in by_source] == [5000, 3000, 2000]
    assert set(by_source[1].values()) == {42, 43} and len(by_source[1]) == 70
    assert set(by_source[0].values()) == {5, 6} and len(by_source[0]) == 900
    assert set(by_source[2].values()) == {1}


@pytest.mark.parametrize("replicas", [2, 4, 8, 10])
@pytest.mark.parametrize("lengths", ["equal", "by source"])
def test_no_replica_misses_a_source(replicas, lengths):
    """A fixed pattern of sources, dealt to every n-th replica, would give one replica all records of one source."""
    seen = [Counter() for _ in range(replicas)]
    for step in range(250):
        kinds = [BLEND.source(record) for record in BLEND.step(step)]
        rows = [[kind] for kind in (sorted(kinds) if lengths == "by source" else kinds)]
        hands = hand_out(rows, replicas, 7, step)
        assert sorted(chain.from_iterable(hands)) == list(range(40))
        assert {len(hand) for hand in hands} == {40 // replicas}
        for found, hand in zip(seen, hands):
            found.update(rows[number][0] for number in hand)
    for found in seen:
        assert [found[kind] / found.total() for kind in range(3)] == pytest.approx(SHARES, rel=0.03)


def test_a_few_rows_go_to_other_replicas_in_other_steps():
    hands = [hand_out([[0], [0, 1]], 4, 1, step) for step in range(400)]
    counts = Counter(rank for hand in hands for rank, rows in enumerate(hand) for row in rows if row == 0)
    assert all(60 < counts[rank] < 140 for rank in range(4))
    assert all(max(map(len, hand)) == 1 for hand in hands) and hand_out([], 3, 0, 0) == [[], [], []]


def test_step_by_step_one_source_at_a_time():
    order = replace(BLEND, by_step=True)
    numbers = [order.source_of(step) for step in range(100)]
    assert Counter(numbers) == {0: 50, 1: 30, 2: 20}
    for step, number in enumerate(numbers):
        assert {order.source(record) for record in order.step(step)} == {number}
    of_second = Counter(chain.from_iterable(order.step(s) for s, number in enumerate(numbers) if number == 1))
    assert set(of_second.values()) == {17, 18} and len(of_second) == 70  # 1200 draws of 70 records
    assert BLEND.source_of(0) is None


@pytest.mark.parametrize(
    ("take", "kept"), [("all", 200), ("first:10%", 20), ("last:30", 30), ("random:0.1%", 1), ("first:900", 200)]
)
def test_a_part_of_the_records(take, kept):
    order = Order(3, 50, (Drawn("a", 100, 0.5), Drawn("b", 200, 0.5, take)))
    drawn = {record - 100 for step in range(kept) for record in order.step(step) if record >= 100}
    assert taken(take, 200) == kept == len(drawn)
    if take.startswith("first"):
        assert drawn == set(range(kept))
    if take.startswith("last"):
        assert drawn == set(range(170, 200))


def test_a_source_keeps_its_order_whatever_else_is_in_the_blend():
    alone = Order(7, 1, (Drawn("b", 70),))
    mixed = [record - 900 for step in range(50) for record in sorted_by_draw(BLEND, step) if BLEND.source(record) == 1]
    assert mixed == [alone.step(step)[0] for step in range(600)]


def sorted_by_draw(order: Order, step: int) -> list[int]:
    """The records of a step before they are permuted."""
    return [replace(order, global_batch=1).step(step * order.global_batch + place)[0] for place in range(40)]
