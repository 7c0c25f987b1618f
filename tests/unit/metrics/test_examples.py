"""Metrics against worked examples, whose scores the official evaluators gave (each file names its own)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nvlm.metrics.captions import words
from nvlm.metrics.edit import distance
from nvlm.metrics.line import Line
from nvlm.metrics.registry import METRICS

EXAMPLES = Path(__file__).parent / "examples"
AT_LEAST = {"vqa_accuracy": 40, "anls": 40, "relaxed_accuracy": 40}


def read(name: str) -> list[dict]:
    return yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))


def line(number: int, row: dict) -> Line:
    """`references` of a row is a list, or how often each text occurs."""
    references = row["references"]
    if isinstance(references, dict):
        references = [text for text, count in references.items() for _ in range(count)]
    more = {key: row[key] for key in ("type", "category") if key in row}
    options = tuple(row.get("options", ()))
    return Line(id=str(number), answer=row["answer"], references=tuple(references), options=options, **more)


@pytest.mark.parametrize("metric", sorted(METRICS.keys() - {"exact_match"}))
def test_a_metric_scores_as_the_official_evaluator(metric):
    rows = read(metric)
    assert len(rows) >= AT_LEAST.get(metric, 10)
    scores = METRICS[metric]([line(number, row) for number, row in enumerate(rows)])
    wrong = [(row, score) for row, score in zip(rows, scores) if score != pytest.approx(row["score"], abs=1e-6)]
    assert len(scores) == len(rows) and not wrong


def test_captions_have_the_words_of_the_official_tokenizer():
    wrong = [(row, words(row["caption"])) for row in read("captions") if words(row["caption"]) != row["words"].split()]
    assert not wrong


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [("dog", ["cat", " dog\n"], 1), ("Dog", ["dog"], 0), ("dog.", ["dog"], 0), ("", [""], 1), ("a dog", ["dog"], 0)],
)
def test_exact_match_ignores_white_space_around_texts(answer, references, score):
    assert METRICS["exact_match"]([Line(id="1", answer=answer, references=tuple(references))]) == [score]


def plain_distance(one: str, other: str) -> int:
    """By Wagner's and Fischer's table."""
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one):
        here = [row + 1]
        for column, own in enumerate(other):
            here.append(min(above[column] + (letter != own), above[column + 1] + 1, here[column] + 1))
        above = here
    return above[-1]


def test_the_distance_in_bits_is_that_of_the_table():
    texts = ["", "a", "ab", "ba", "abc", "kitten", "sitting", "a" * 70, "ab" * 40, "ba" * 40, "\u00e9t\u00e9", "a b"]
    for one in texts:
        for other in texts:
            assert distance(one, other) == plain_distance(one, other), (one, other)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [("a dog.", "B", 1), ("A Dog", "B", 1), ("B", "a dog", 1), ("dog", "B", 0), ("c", "C", 1), ("b", "C", 0)],
)
def test_a_choice_may_be_the_text_of_its_option(answer, reference, score):
    options = ("a cat", "a dog", "b")
    line = Line(id="1", answer=answer, references=(reference,), options=options)
    assert METRICS["choice"]([line]) == [score]
