"""Average normalised Levenshtein similarity, the metric of DocVQA, InfographicVQA and ST-VQA."""

from __future__ import annotations

from nvlm.metrics.edit import distance
from nvlm.metrics.line import Line

THRESHOLD = 0.5


def anls(line: Line) -> float:
    """1 - distance / length for the most similar reference, and 0 below 0.5 (Biten et al. 2019, equation 1).

    The rule of the Robust Reading Competition's evaluator: both texts are lower-cased and runs of white space become
    one space, but the length is that of the longer text before that (in capitals).
    """
    answer, length = _plain(line.answer), len(line.answer.upper())
    shares = (_differing(answer, length, reference) for reference in line.references)
    found = 1 - min(shares)
    return found if found >= THRESHOLD else 0.0


def _differing(answer: str, length: int, reference: str) -> float:
    longer, plain = max(length, len(reference.upper())), _plain(reference)
    if longer and abs(len(plain) - len(answer)) / longer > 1 - THRESHOLD:  # at least as far apart: no need to count
        return 1.0
    return distance(answer, plain) / longer if longer else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
