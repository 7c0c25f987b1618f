"""Multiple choice with short answers: AI2D, RealWorldQA, and MMLU's letters for text alone."""

from __future__ import annotations

import re
import string

from nvlm.metrics.line import Line

LEADING_LETTER = re.compile(r"\s*([A-Z])\.")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def choice(line: Line) -> float:
    """1.0 if the answer names the right option, whose letter or text is a reference.

    The rule of lmms-eval for AI2D and of lm-evaluation-harness for MMLU: of an answer like "B. a dog" the letter
    counts, and answers are compared without case, punctuation and surrounding white space. Besides, an answer that is
    the whole text of an option stands for its letter.
    """
    chosen = chosen_letter(line)
    return float(any(chosen == _lettered(_plain(reference), line) for reference in line.references))


def chosen_letter(line: Line) -> str:
    """The answer in the form in which it is compared: a small letter, if it names an option."""
    leading = LEADING_LETTER.match(line.answer)
    return _lettered(_plain(leading[1] if leading else line.answer), line)


def names_no_option(line: Line) -> bool:
    """Whether the answer is neither the letter nor the text of an option."""
    return bool(line.options) and chosen_letter(line).upper() not in line.letters


def _lettered(plain: str, line: Line) -> str:
    """The letter of the option that is called so, or `plain` itself, which may be a letter already."""
    texts = {_plain(text): letter.lower() for letter, text in reversed(list(zip(line.letters, line.options)))}
    return plain if plain.upper() in line.letters else texts.get(plain, plain)


def _plain(text: str) -> str:
    return text.lower().translate(_WITHOUT_PUNCTUATION).strip()
