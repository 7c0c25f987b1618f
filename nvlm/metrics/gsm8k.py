"""GSM8K: the number at the end of a worked solution."""

from __future__ import annotations

import re

from nvlm.metrics.line import Line

MARKED = re.compile(r"#### (-?[0-9.,]+)")
ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def gsm8k(line: Line) -> float:
    """1.0 if the answer's number is a reference's.

    The number is the one after "####" (Cobbe et al. 2021; openai/grade-school-math), otherwise the last one (the
    flexible match of lm-evaluation-harness and lmms-eval). Numbers are compared as text without commas, dollar signs
    and a final period, as there: 18.00 is not 18.
    """
    number = number_of(line.answer)
    return float(number is not None and number in {_written(text.split("####")[-1]) for text in line.references})


def number_of(answer: str) -> str | None:
    """The answer's number, or None if it has none."""
    marked = MARKED.search(answer)
    found = [marked[1]] if marked else ANY_NUMBER.findall(answer)
    return _written(found[-1]) if found else None


def _written(number: str) -> str:
    return re.sub(r"\.$", "", number.strip().replace(",", "").replace("$", ""))
