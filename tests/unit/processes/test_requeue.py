"""What a submitit job does on signals, with a fake of submitit's handler."""

from __future__ import annotations

import os
import signal

import pytest

from nvlm.processes.requeue import requeued


@pytest.fixture
def calls(monkeypatch):
    """The signals received by submitit's handler."""
    monkeypatch.setenv("SUBMITIT_FOLDER", "jobs")
    got: list[int] = []
    before = [
        (number, signal.signal(number, handler))
        for number, handler in ((signal.SIGUSR2, lambda n, _: got.append(n)), (signal.SIGTERM, lambda *_: None))
    ]
    yield got
    for number, handler in before:
        signal.signal(number, handler)


def test_a_run_that_can_save_is_asked_to_first(calls):
    came = []
    with requeued(lambda: False):
        mine = signal.signal(signal.SIGTERM, lambda *_: came.append(len(calls)))
        os.kill(os.getpid(), signal.SIGUSR2)
        signal.signal(signal.SIGTERM, mine)
    assert came == [0] and calls == [signal.SIGUSR2]
    os.kill(os.getpid(), signal.SIGUSR2)  # submitit's handler is back
    assert len(calls) == 2


def test_where_nothing_can_be_saved_the_job_is_requeued_at_once(calls):
    with requeued(lambda: False):
        os.kill(os.getpid(), signal.SIGUSR2)
        assert calls == [signal.SIGUSR2]


@pytest.mark.parametrize(("unfinished", "times"), [(True, 1), (False, 0)])
def test_a_run_that_ended_early_is_requeued_by_itself(calls, unfinished, times):
    """Preemption: Slurm sends SIGTERM, which submitit ignores."""
    with requeued(lambda: unfinished):
        raise SystemExit(0)  # as after workers were stopped by a signal
    assert len(calls) == times


def test_a_failure_is_passed_on(calls):
    with pytest.raises(SystemExit), requeued(lambda: True):
        raise SystemExit(1)
    with pytest.raises(ValueError), requeued(lambda: True):
        raise ValueError
    assert not calls


def test_a_failure_behind_the_signal_is_requeued(calls):
    with requeued(lambda: False):
        mine = signal.signal(signal.SIGTERM, lambda *_: None)
        os.kill(os.getpid(), signal.SIGUSR2)
        signal.signal(signal.SIGTERM, mine)
        raise SystemExit(1)
    assert calls == [signal.SIGUSR2]


def test_elsewhere_nothing_changes(calls, monkeypatch):
    monkeypatch.delenv("SUBMITIT_FOLDER")
    with requeued(lambda: True):
        pass
    with pytest.raises(SystemExit), requeued(lambda: True):
        raise SystemExit(0)
    assert not calls
