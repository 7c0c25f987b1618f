"""Which tasks a configuration asks."""

from __future__ import annotations

import json

import pytest

from nvlm.commands.compose import check_overrides
from nvlm.config.values import ConfigError
from nvlm.evaluate.tasks import build_task, check_names, check_tasks
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


def test_files_are_checked_before_a_run_starts(tmp_path):
    """The first line cannot be read, and the second has one answer."""
    file = tmp_path / "held.jsonl"
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "2"}]
    file.write_text("{}\n" + json.dumps({"messages": turns}) + "\n")
    words = ("data=jsonl", f"data.path={file}", f"data.heldout_path={file}")
    check_tasks(config(*words, "evaluate.metric=anls"))
    with pytest.raises(ConfigError, match=r"vqa_accuracy, and held.jsonl:2 with 1 as references.*at least 4"):
        check_tasks(config(*words, "evaluate.metric=vqa_accuracy"))


@pytest.mark.parametrize("word", ["evaluate.tasks=[foo]", "evaluate.metric=anl"])
def test_names_are_checked_without_files(word):
    with pytest.raises(ConfigError, match="expected one of"):
        check_names(config(word))
