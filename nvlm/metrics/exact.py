"""Exact match."""

from __future__ import annotations

from nvlm.metrics.line import Line


def exact_match(line: Line) -> float:
    """1.0 if the answer equals a reference, without surrounding white space."""
    return float(line.answer.strip() in {reference.strip() for reference in line.references})
