"""When a run ends because too many records cannot be used."""

from __future__ import annotations

import json

import pytest

from nvlm.train.skipped import Tally, stopped, too_many


def tally(*steps, fewer=0):
    found = Tally()
    for drawn, skipped in steps:
        found = found.after(drawn, skipped, fewer)
    return found


def verdict(*steps, limit=0.01, size=100_000, last=False):
    return too_many(tally(*steps), limit, size, last)


def test_a_step_without_a_usable_record_ends_the_run():
    assert "none of the last 4 records can be used" in verdict((4, 0), (4, 4))
    assert verdict((4, 4), limit=1.0) is not None
    assert verdict((4, 3)) is None and verdict((4, 0), (4, 3)) is None


def test_small_steps_may_be_without_one_by_chance():
    assert verdict((1, 0), (1, 1), (1, 0), (1, 1), (1, 1)) is None
    assert verdict(*[(1, 1)] * 4) is not None


def test_a_run_that_saw_no_usable_record_does_not_succeed():
    assert verdict((1, 1), last=True) is not None
    assert verdict((1, 1), last=False) is None
    assert verdict((1, 0), last=True) is None


def test_the_share_is_judged_against_a_thousand_records_at_least():
    assert verdict((256, 10)) is None
    assert "more than data.max_skipped=0.01" in verdict((256, 11))
    assert verdict((2000, 20)) is None
    assert verdict((2000, 21)) is not None
    assert verdict((256, 11), limit=0.02) is None
    assert verdict((100, 1), limit=0.0) is not None


def test_more_than_half_is_too_much_for_any_file():
    assert "more than half" in verdict((4, 2), (4, 3), size=5)
    assert verdict((4, 2), (4, 2), size=4) is None
    assert verdict((4, 2), (4, 3), size=5, limit=0.9) is None


@pytest.mark.parametrize("epochs", [1, 10, 1000])
def test_a_bad_record_of_a_small_file_ends_no_run_however_often_it_comes(epochs):
    assert verdict(*[(20, 1)] * epochs, size=20) is None


def test_the_end_tells_counts_and_first_reasons(tmp_path):
    path = tmp_path / "skipped.jsonl"
    path.write_text("".join(json.dumps({"record": f"r:{i}", "reason": f"why {i}"}) + "\n" for i in range(9)))
    text = str(stopped(tally((4, 4)), "so", path))
    assert text.startswith("bad records: got 4 of 4; so. First: r:0: why 0; r:1: why 1; r:2: why 2. Fix: ")
    assert str(path) in text and "r:3" not in text
    assert "First" not in str(stopped(tally((4, 4)), "so", tmp_path / "gone.jsonl"))


def test_the_closing_line_tells_what_was_lost():
    assert str(tally((8, 0))) == "records: 8 drawn, 0 skipped"
    assert str(tally((8, 3), fewer=2)) == (
        "records: 8 drawn, 3 skipped, named in skipped.jsonl; 2 with fewer tiles than tiling.max_tiles allows, to fit"
    )
