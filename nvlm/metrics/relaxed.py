"""Relaxed accuracy, the metric of ChartQA and PlotQA."""

from __future__ import annotations

from nvlm.metrics.line import Line

TOLERANCE = 0.05


def relaxed_accuracy(line: Line) -> float:
    """1.0 if the answer is within 5% of a reference, or equals it in any case of letters where one is no number.

    Masry et al. 2022, section 5.1, as in google-research/pix2struct, pix2struct/metrics.py: a final "%" divides by 100,
    and a reference of zero is compared as text, so that "0.0" is not "0" and "5" is not "5%". White space counts in
    texts.
    """
    return float(any(_close(line.answer, reference) for reference in line.references))


def _close(answer: str, reference: str) -> bool:
    given, true = _number(answer), _number(reference)
    if given is None or not true:
        return answer.lower() == reference.lower()
    return abs(given - true) / abs(true) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
