"""The plan of the vision pre-pass: every tile once, even shares, as few tiles moved as possible."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nvlm.data.batch import EVERYWHERE
from nvlm.vision.prepass import encoding_seats, seat_counts, shares, spread

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@given(COUNTS, st.integers(1, 8))
def test_each_tile_falls_to_one_seat(counts, seats):
    by_seat = [seat_counts(counts, seats, seat) for seat in range(seats)]
    assert [sum(column) for column in zip(*by_seat)] == counts
    assert max(map(sum, by_seat)) - min(map(sum, by_seat)) <= 1


@given(st.lists(st.integers(EVERYWHERE, 4), max_size=40))
def test_a_tile_is_encoded_where_it_was_decoded_unless_that_seat_has_its_share(holders):
    room = [seat_counts([len(holders)], 5, seat)[0] for seat in range(5)]
    found = encoding_seats(holders, room)
    assert [found.count(seat) for seat in range(5)] == room
    for seat in range(5):
        stayed = sum(a == b == seat for a, b in zip(holders, found))
        assert stayed == min(room[seat], holders.count(seat))


@given(COUNTS, st.integers(1, 8))
def test_no_rank_encodes_more_than_one_more_than_another(counts, seats):
    encoded = []
    for seat in range(seats):
        own = seat_counts(counts, seats, seat)
        sent = spread(own)
        assert [sum(row) for row in sent] == own
        encoded += [sum(column) for column in zip(*sent)]
    assert sum(encoded) == sum(counts)
    assert max(encoded) - min(encoded) <= 1


@given(COUNTS)
def test_a_tile_moves_only_away_from_a_replica_with_more_than_its_share(own):
    sent = spread(own)
    share = -(-sum(own) // len(own))
    for replica, row in enumerate(sent):
        assert all(count >= 0 for count in row)
        moved = sum(row) - row[replica]
        assert moved <= max(0, own[replica] - share + 1)
        if moved:  # who sends does not receive
            assert all(other[replica] == 0 for number, other in enumerate(sent) if number != replica)


@given(COUNTS, st.integers(1, 8))
def test_shares_are_even_where_they_can_be(counts, seats):
    everywhere, at_home = (shares(counts, seats, balance) for balance in ("global", "replica"))
    assert len(everywhere) == len(at_home) == seats * len(counts)
    assert sum(everywhere) == sum(at_home) == sum(counts)
    assert max(everywhere) - min(everywhere) <= 1
    for replica, count in enumerate(counts):
        own = at_home[replica * seats : (replica + 1) * seats]
        assert sum(own) == count and max(own) - min(own) <= 1


def test_seven_tiles_beside_none():
    assert spread([7, 0]) == [[4, 3], [0, 0]]
    assert seat_counts([7, 0], 2, 0) == [4, 0]
