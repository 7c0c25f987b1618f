"""MMMU: options and open answers found in free text.

The rules of MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py (Yue et al. 2024).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from nvlm.metrics.line import Line

SEED = 42  # of the guesses that stand for answers without a choice
EDGES = ",.!?;:'"  # removed at both ends of an answer, one after the other
A_SENTENCE = 5  # an answer of more words is searched for the options' texts
BEFORE_ANSWERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,000
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def mmmu(lines: Sequence[Line]) -> list[float]:
    """1.0 for each right answer; a question with options has its letter as reference.

    An answer without a choice counts as a random option, drawn with the official seed in the order of the lines.
    """
    rng = random.Random(SEED)
    return [_of_options(line, rng) if line.options else open_answer(line) for line in lines]


def _of_options(line: Line, rng: random.Random) -> float:
    chosen = chosen_option(line)
    return float((rng.choice(line.letters) if chosen is None else chosen) in line.references)


def is_guess(line: Line) -> bool:
    """Whether the answer names no option, so that a random one is scored."""
    return bool(line.options) and chosen_option(line) is None


def chosen_option(line: Line) -> str | None:
    """The letter that the answer names last: as "(A)", else as "A" between spaces, else by an option's text."""
    answer = line.answer
    for mark in EDGES:
        answer = answer.strip(mark)
    answer = f" {answer} "
    places = {letter: answer.rfind(f"({letter})") for letter in line.letters}
    if max(places.values()) < 0:
        places = {letter: answer.rfind(f" {letter} ") for letter in line.letters}
    if max(places.values()) < 0 and len(answer.split()) > A_SENTENCE:
        texts = zip(line.letters, line.options)
        places = {letter: answer.lower().rfind(option.lower()) for letter, option in texts}
    last = max(places, key=lambda letter: places[letter])
    return last if places[last] >= 0 else None


def open_answer(line: Line) -> float:
    """1.0 if a reference's text is part of one of the answer's texts, or its number (to two decimals) one of theirs."""
    texts = _key_texts(line.answer)
    numbers = [number for text in texts for pattern in NUMBERS for number in pattern.findall(text)]
    given = {form for text in [*texts, *numbers] for form in _forms(text)}
    true = {form for reference in line.references for form in _forms(reference)}
    contained = any(t in g for g in given for t in true if isinstance(g, str) and isinstance(t, str))
    return float(contained or any(number in true for number in given if isinstance(number, float)))


def _key_texts(answer: str) -> list[str]:
    """What follows the words that announce an answer, by line; the whole answer if there are none.

    The evaluator also means to split at sentences, by a capital letter after a period, but has lower-cased the text."""
    whole = answer.strip().strip(".").lower()
    parts = whole.split("\n")
    found = []
    for number, part in enumerate(parts):
        words = (*BEFORE_ANSWERS, "=") if number == len(parts) - 1 else BEFORE_ANSWERS
        ends = [part.split(word)[-1].strip() for word in words if word in part]
        shortest = _shortest(ends)
        if shortest and shortest not in tuple(":,.!?;'"):
            found.append(shortest)
    return found or [whole]


def _shortest(ends: Sequence[str]) -> str:
    """The first of the shortest texts; one that is empty gives way to any that comes after it."""
    best = ""
    for end in ends:
        if not best or len(end) < len(best):
            best = end
    return best


def _forms(text: str) -> list[str | float]:
    """A number, or a text in small letters. A single letter must begin or end a word: it has the forms for both."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        small = text.lower()
        return [f" {small}", f"{small} "] if len(small) == 1 else [small]
