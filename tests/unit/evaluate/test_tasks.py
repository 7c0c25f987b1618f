"""Which tasks a configuration asks."""

from __future__ import annotations

import pytest

from nvlm.commands.compose import check_overrides
from nvlm.config.values import ConfigError
from nvlm.evaluate.tasks import build_task
from nvlm.tasks.records import RecordQuestions


def config(*words):
    return check_overrides(list(words))[0]


def test_a_metric_that_the_records_cannot_serve_is_refused():
    """Against one annotator no answer could score more than 0."""
    with pytest.raises(ConfigError, match="vqa_accuracy, and .* with 1 as references, expected .* at least 4"):
        build_task("heldout", config("evaluate.metric=vqa_accuracy"))
    task = build_task("heldout", config("evaluate.metric=anls"))
    assert task.config.metric == "anls" and task.count > 0


def test_a_question_that_cannot_be_read_does_not_end_the_check(monkeypatch):
    """Readers of untrusted files raise errors of any kind."""
    whole = RecordQuestions.__getitem__

    def broken_first(self, index):
        return whole(self, index) if index else {}["key"]

    monkeypatch.setattr(RecordQuestions, "__getitem__", broken_first)
    assert build_task("heldout", config("evaluate.metric=anls")).count > 0
    with pytest.raises(ConfigError, match="at least 4"):
        build_task("heldout", config("evaluate.metric=vqa_accuracy"))
