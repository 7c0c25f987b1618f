"""Which checkpoint of a run counts as its best so far."""

from __future__ import annotations

import json

import pytest

from nvlm.evaluate.during import During
from nvlm.evaluate.score import Score
from nvlm.metrics.intervals import Interval

STEP = "step_00000002"


def score(mean: float, metric: str = "anls") -> dict[str, Score]:
    whole = Interval(mean=mean, low=mean, high=mean, count=1)
    values = {"task": "heldout", "step": 4, "checkpoint": "", "by_category": {}, "unanswered": 0}
    return {"heldout": Score(metric=metric, whole=whole, **values)}


@pytest.fixture
def during(tmp_path, configured, monkeypatch):
    """A run whose best checkpoint scored 0.5."""
    monkeypatch.setattr("nvlm.evaluate.during.groups.from_first_rank", lambda value: value)
    (tmp_path / "checkpoints" / STEP).mkdir(parents=True)
    (tmp_path / "checkpoints" / "best").write_text(f"{STEP}\n")
    folder = tmp_path / "evaluation" / "heldout" / STEP
    folder.mkdir(parents=True)
    (folder / "score.json").write_text(json.dumps({"mean": 0.5, "metric": "anls"}))
    return During(configured("evaluate.best=heldout"), tmp_path, 0.0)


def test_only_a_higher_score_is_better(during):
    assert [during._is_best(score(mean)) for mean in (0.4, 0.5, 0.6)] == [False, False, True]
    assert not during._is_best({})


def test_a_score_whose_checkpoint_was_not_kept_does_not_count(during):
    """After a bad step the best checkpoint is not kept, and a lower score later may still be the best."""
    assert during._is_best(score(0.9)) and during._is_best(score(0.7))


@pytest.mark.parametrize("damage", ["[]", '{"mean": null, "metric": "anls"}', "", '{"mean": 0.5, "metric": "choice"}'])
def test_another_metric_and_a_damaged_score_do_not_count(during, damage):
    (during.root / "heldout" / STEP / "score.json").write_text(damage)
    assert during._is_best(score(0.1))


def test_a_best_checkpoint_that_is_gone_does_not_count(during):
    (during.run_dir / "checkpoints" / STEP).rmdir()
    assert during._is_best(score(0.1))
