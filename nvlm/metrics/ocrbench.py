"""OCRBench: whether the answer contains the text that is asked for."""

from __future__ import annotations

from nvlm.metrics.line import Line

FORMULAS = {"HME100k", "Handwritten Mathematical Expression Recognition"}


def ocrbench(line: Line) -> float:
    """1.0 if a reference is part of the answer (Liu et al. 2023; Yuliang-Liu/MultimodalOCR, OCRBench/example.py).

    Case does not count, and a line break is a space. In handwritten formulas (type or category HME100k) case counts and
    spaces do not. The benchmark's own score is the number of right answers among its 1,000 questions.
    """
    plain = _formula if FORMULAS & {line.type, line.category} else _text
    answer = plain(line.answer)
    return float(any(plain(reference) in answer for reference in line.references))


def _text(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
