"""Answer files as users have them."""

from __future__ import annotations

import json
import re

import pytest

from nvlm.config.values import ConfigError
from nvlm.metrics import answers
from nvlm.metrics.answers import read_answers

GOOD = {"id": 1, "answer": "a", "references": ["a"]}
CHOICE = {"id": 1, "answer": "A", "references": ["A"], "options": ["cat", "dog"]}


def read(tmp_path, *rows, metric="exact_match", end="\n"):
    """What is read of a file with these rows, each an object or the text itself."""
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(texts) + end, encoding="utf-8")
    return read_answers(path, metric)


def test_all_of_a_line_is_read_and_other_keys_are_not(tmp_path):
    row = {**CHOICE, "type": "multiple-choice", "category": "Art", "score": 1, "tiles": [3]}
    (line,) = read(tmp_path, "\ufeff" + json.dumps(row), "", metric="mmmu").lines
    assert (line.id, line.answer, line.references, line.options) == ("1", "A", ("A",), ("cat", "dog"))
    assert (line.type, line.category, line.reason, line.letters) == ("multiple-choice", "Art", "", ("A", "B"))


def test_one_reference_needs_no_list_and_numbers_are_texts(tmp_path):
    (line,) = read(tmp_path, {"id": 7, "answer": 2.5, "references": 2}).lines
    assert (line.id, line.answer, line.references) == ("7", "2.5", ("2",))


def test_a_last_line_that_breaks_off_is_left_out_and_said(tmp_path):
    found = read(tmp_path, GOOD, json.dumps(GOOD)[:20], end="")
    assert len(found.lines) == 1 and found.cut == 2
    found = read(tmp_path, GOOD, {**GOOD, "id": 2}, end="")
    assert len(found.lines) == 2 and found.cut is None
    with pytest.raises(ConfigError, match="line 1: got"):
        read(tmp_path, json.dumps(GOOD)[:20], end="")


def test_a_question_that_could_not_be_asked_needs_no_references(tmp_path):
    found = read(tmp_path, {"id": 1, "answer": "", "references": [], "reason": "no image"}, metric="vqa_accuracy")
    assert found.lines[0].reason == "no image"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "no json", GOOD], r"line 2: got 'no json' \(.*sed -i 2d .*answers.jsonl"),
        (['{"id": 1'], "line 1: got"),
        (["[" * 200_000, GOOD], "line 1: got .* expected a JSON object"),
        ([GOOD, "[1]"], "line 2: got a JSON list, expected an object such as"),
        ([""], "got an empty file"),
        ([GOOD, GOOD], "line 2: got the id '1' of line 1 again"),
        ([{"id": 1, "references": ["a"]}], "line 1: got no 'answer'"),
        ([{"answer": "a", "references": ["a"]}], "line 1: got no 'id'"),
        ([{**GOOD, "answer": None}], "line 1: answer: got None, expected a text"),
        (['{"id": 1, "answer": NaN, "references": ["a"]}'], "NaN is not JSON"),
        (['{"id": 1, "answer": 1e999, "references": ["a"]}'], "answer: got inf"),
        ([{**GOOD, "id": True}], "id: got True"),
        ([{**GOOD, "options": "ab"}], "options: got 'ab', expected a list"),
        ([{**GOOD, "references": {"a": 1}}], "references: got {'a': 1}"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, *rows)


@pytest.mark.parametrize(
    ("metric", "row", "message"),
    [
        ("anls", {"id": 1, "answer": "a"}, "line 1: references: got none, expected at least one, for anls"),
        ("vqa_accuracy", GOOD, "references: got 1, expected at least 4.*metric=exact_match"),
        ("mmmu", {**CHOICE, "options": []}, 'options: got none.*"type": "open"'),
        ("mmmu", {**CHOICE, "references": ["C"]}, "references: got 'C', expected one of A, B"),
        ("mathvista", CHOICE, 'references: got \'A\', expected the right option\'s text.*"references": \\["cat"\\]'),
        ("mathvista", {**GOOD, "type": "number"}, "type: got 'number', expected integer, float:1"),
        ("mathvista", {**GOOD, "type": "float:x"}, "type: got 'float:x'"),
        ("mathvista", {**GOOD, "type": "integer:1"}, "type: got 'integer:1'"),
    ],
)
def test_what_a_metric_lacks_is_said(tmp_path, metric, row, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, row, metric=metric)


@pytest.mark.parametrize("kind", ["integer", "float", "float:2", "list"])
def test_types_that_mathvista_has_are_read(tmp_path, kind):
    assert read(tmp_path, {**GOOD, "type": kind}, metric="mathvista").lines[0].type == kind


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "LONGEST", 1 << 20)
    with pytest.raises(ConfigError, match="line 2: got more than 1 MiB"):
        read(tmp_path, GOOD, "x" * (1 << 20))


def test_a_folder_is_no_answer_file(tmp_path):
    (tmp_path / "answers.jsonl").touch()
    with pytest.raises(ConfigError, match=re.escape(f"Fix: answers={tmp_path}/answers.jsonl")):
        read_answers(tmp_path, "anls")
