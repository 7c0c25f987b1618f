"""CIDEr-D, the metric of captions (Vedantam et al. 2015, section 4 and its appendix on gaming).

The rules of salaniz/pycocoevalcap, cider/cider_scorer.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain

from nvlm.metrics.captions import words
from nvlm.metrics.line import Line

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the Gaussian penalty on lengths that differ

Gram = tuple[str, ...]


def cider(lines: Sequence[Line]) -> list[float]:
    """The CIDEr-D of each caption, from 0 to 10; publications give 100 times its mean.

    n-grams are weighted by how few of the images have them in a reference, so scores depend on all lines: they mean
    something for a whole benchmark only, and are 0 for a single line.
    """
    references = [[grams(words(text)) for text in line.references] for line in lines]
    images = Counter(chain.from_iterable(set().union(*counts) for counts in references))
    answers = [grams(words(line.answer)) for line in lines]
    return [_similarity(answer, some, images, len(lines)) for answer, some in zip(answers, references)]


def grams(tokens: Sequence[str]) -> Counter[Gram]:
    """How often each run of one to four words occurs."""
    return Counter(
        tuple(tokens[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(tokens) - length + 1)
    )


def _similarity(answer: Counter[Gram], references: Sequence[Counter[Gram]], images: Counter[Gram], count: int) -> float:
    """Ten times the mean over lengths of n-grams and over references."""
    weighted = _weighted(answer, images, count)
    total = 0.0
    for reference in references:
        apart = _bigrams(answer) - _bigrams(reference)
        penalty = math.exp(-(apart**2) / (2 * SIGMA**2))
        total += penalty * sum(map(_cosine, weighted, _weighted(reference, images, count)))
    return 10 * total / len(references) / LONGEST


def _bigrams(counts: Counter[Gram]) -> int:
    """How many a caption has: what the evaluator takes for its length."""
    return sum(number for gram, number in counts.items() if len(gram) == 2)


def _weighted(counts: Counter[Gram], images: Counter[Gram], count: int) -> list[dict[Gram, float]]:
    """By length: n-grams with their number times the logarithm of images / images that have them."""
    found: list[dict[Gram, float]] = [{} for _ in range(LONGEST)]
    for gram, number in counts.items():
        found[len(gram) - 1][gram] = number * (math.log(count) - math.log(max(1, images[gram])))
    return found


def _cosine(answer: dict[Gram, float], reference: dict[Gram, float]) -> float:
    """The cosine, in which an n-gram of the answer counts no more often than the reference has it."""
    product = sum(
        min(weight, reference[gram]) * reference[gram] for gram, weight in answer.items() if gram in reference
    )
    norms = math.hypot(*answer.values()) * math.hypot(*reference.values())
    return product / norms if norms else product
