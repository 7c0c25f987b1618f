"""The metrics by name. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nvlm.metrics.anls import anls
from nvlm.metrics.choice import choice, names_no_option
from nvlm.metrics.cider import cider
from nvlm.metrics.exact import exact_match
from nvlm.metrics.gsm8k import gsm8k, number_of
from nvlm.metrics.line import Line
from nvlm.metrics.mathvista import is_unextracted, mathvista
from nvlm.metrics.mmmu import is_guess, mmmu
from nvlm.metrics.ocrbench import ocrbench
from nvlm.metrics.relaxed import relaxed_accuracy
from nvlm.metrics.vqa import textvqa_accuracy, vqa_accuracy

Metric = Callable[[Sequence[Line]], list[float]]
"""The score of each line. A metric that needs all lines at once, such as CIDEr-D, is given all of them."""


def each(score: Callable[[Line], float]) -> Metric:
    """The metric that scores each line by itself."""
    return lambda lines: [score(line) for line in lines]


METRICS: dict[str, Metric] = {
    "exact_match": each(exact_match),
    "vqa_accuracy": each(vqa_accuracy),
    "textvqa_accuracy": each(textvqa_accuracy),
    "anls": each(anls),
    "relaxed_accuracy": each(relaxed_accuracy),
    "ocrbench": each(ocrbench),
    "choice": each(choice),
    "mmmu": mmmu,
    "mathvista": each(mathvista),
    "gsm8k": each(gsm8k),
    "cider": cider,
}

UNREAD: dict[str, Callable[[Line], bool]] = {
    "choice": names_no_option,
    "mmmu": is_guess,
    "mathvista": is_unextracted,
    "gsm8k": lambda line: number_of(line.answer) is None,
}
"""Of metrics that look for an answer in free text: whether they find none in a line."""


def scored(metric: str, lines: Sequence[Line]) -> list[float]:
    """The score of each line. Questions that could not be asked (`reason`) score 0."""
    asked = iter(METRICS[metric]([line for line in lines if not line.reason]))
    return [0.0 if line.reason else next(asked) for line in lines]


def unread(metric: str, line: Line) -> bool:
    """Whether `metric` found no answer in the line's text."""
    return not line.reason and metric in UNREAD and UNREAD[metric](line)
