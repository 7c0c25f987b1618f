"""VQA accuracy, as defined by the VQA challenge, and its variant on EvalAI, which TextVQA uses.

For each annotator the score is min(1, matches among the other annotators / 3), and the mean of these counts (Antol et
al. 2015, section 5; GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py). Texts are normalised first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from nvlm.metrics.line import Line

ENOUGH = 3  # other annotators that must agree with an answer
# In this order. Each is removed if it touches a space anywhere in the text, or if the text has a number such as 1,000;
# otherwise a space takes its place.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WITH_COMMA = re.compile(r"\d,\d", re.ASCII)
# The evaluator means to keep the period of a decimal number, but looks only at the character behind it. It also passes
# re.UNICODE, which is 32, as the greatest number of periods to remove.
PERIOD, PERIODS = re.compile(r"\.(?!\d)", re.ASCII), 32
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
# A word without one of its apostrophes. The last entry is a mistake in the evaluator's table.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_accuracy(line: Line) -> float:
    """The share of agreement with ten annotators. Texts are normalised only if the annotators differ."""
    answer, references = _trimmed(line.answer), [_trimmed(text) for text in line.references]
    if len(set(references)) > 1:
        answer, references = normalised(answer), [normalised(text) for text in references]
    return agreement(answer, references)


def textvqa_accuracy(line: Line) -> float:
    """VQA accuracy of TextVQA (Singh et al. 2019), by the evaluator of its server (facebookresearch/mmf,
    mmf/utils/m4c_evaluators.py): texts are always normalised, and before that lower-cased, without commas and question
    marks, and "'s" becomes a word. lmms-eval and VLMEvalKit use it for VQAv2, too."""
    return agreement(_split(line.answer), [_split(text) for text in line.references])


def agreement(answer: str, references: Sequence[str]) -> float:
    """min(1, matches among the other references / 3), averaged over the references."""
    matches = sum(reference == answer for reference in references)
    with_it, without = min(1.0, (matches - 1) / ENOUGH), min(1.0, matches / ENOUGH)
    return (matches * with_it + (len(references) - matches) * without) / len(references)


@lru_cache(maxsize=1 << 12)  # annotators repeat each other
def normalised(text: str) -> str:
    """`text` without punctuation, capitals and articles, with digits for zero to ten and apostrophes put back."""
    remove_all = NUMBER_WITH_COMMA.search(text) is not None
    bare = text
    for mark in PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if touches or remove_all else " ")
    words = [NUMBERS.get(word, word) for word in PERIOD.sub("", bare, count=PERIODS).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _trimmed(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _split(text: str) -> str:
    lower = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalised(_trimmed(lower.strip()))
