"""MathVista, without the second model that its evaluator asks to extract answers from free text.

The rules of lupantech/MathVista, evaluation/extract_answer.py (the quick ones) and calculate_score.py (Lu et al. 2024).
"""

from __future__ import annotations

import re

from nvlm.metrics.edit import distance
from nvlm.metrics.line import Line

QUOTED = re.compile(r'The answer is "(.*)"\.')
IN_PARENTHESES = re.compile(r"\(([a-zA-Z])\)")
LETTER_FIRST = re.compile(r"\(?([a-zA-Z])\)?[.:]?(?=\s|$)")


def mathvista(line: Line) -> float:
    """1.0 if the answer, in the form of its type, equals a reference.

    `type` is "integer", "float:2" (two decimals; "float": as many as the reference has), "list" or "text"; a question
    with options has the right option's text as its reference. An answer from which the rules extract nothing scores 0.
    With options, a letter at the beginning is extracted, too, although the evaluator leaves that to the second model.
    """
    extracted = extraction(line)
    if extracted is None:
        return 0.0
    return float(any(_normal(extracted, line, reference) == reference for reference in line.references))


def is_unextracted(line: Line) -> bool:
    """Whether the official evaluator would ask a second model what the answer is."""
    return extraction(line) is None


def extraction(line: Line) -> str | None:
    """What the rules take for the answer: an option, a number, what is quoted, or a letter."""
    answer = line.answer
    if line.options and answer in line.options:
        return answer
    kind = line.type.partition(":")[0]
    if (number := _number(answer, kind)) is not None:
        return number
    if quoted := QUOTED.search(answer):
        return quoted[1]
    letter = LETTER_FIRST.match(answer.strip()) if line.options else None
    return letter[1].upper() if letter and letter[1].upper() in line.letters else None


def _number(answer: str, kind: str) -> str | None:
    parse = {"integer": int, "float": float}.get(kind)
    try:
        return str(parse(answer)) if parse else None
    except ValueError:
        return None


def _normal(extracted: str, line: Line, reference: str) -> str | None:
    kind, _, decimals = line.type.partition(":")
    try:
        if line.options:
            return _option(extracted.strip(), line)
        if kind == "integer":
            return str(int(float(extracted)))
        if kind == "float":
            return str(round(float(extracted), int(decimals or len(reference.partition(".")[2]))))
    except (ValueError, OverflowError):
        return None
    return extracted


def _option(extracted: str, line: Line) -> str:
    """The option of a letter, or the one with the most similar text."""
    if letters := IN_PARENTHESES.findall(extracted):
        extracted = letters[0].upper()
    if extracted in line.letters:
        return line.options[line.letters.index(extracted)]
    return min(line.options, key=lambda option: distance(extracted, option))
