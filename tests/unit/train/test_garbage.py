"""Garbage is collected when the loop says so, and automatically again afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from nvlm.train.garbage import Collector, automatic


class Knot:
    """Only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def restored():
    yield
    gc.unfreeze()
    gc.enable()


def knot():
    return weakref.ref(Knot())


def many() -> None:
    """Enough new objects for an automatic collection of the young ones."""
    kept = [Knot() for _ in range(20 * gc.get_threshold()[0])]
    assert kept


def test_nothing_is_collected_but_at_the_steps_that_are_due():
    with Collector() as collect:
        assert gc.isenabled(), "the loader's workers would inherit it"
        first = knot()
        collect(7)  # the first step of a resumed run
        assert first() is None and gc.get_freeze_count() > 10_000
        later = knot()
        for step in range(8, 20):
            many()
            collect(step)
        assert later() is not None
        collect(20)
        assert later() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_evaluation_collects_automatically():
    with Collector() as collect:
        with automatic():
            assert gc.isenabled()
        assert gc.isenabled(), "before the first step"
        collect(1)
        with pytest.raises(ValueError), automatic():
            before = knot()
            many()
            assert before() is None
            raise ValueError
        assert not gc.isenabled()
