"""The words of captions, as CIDEr counts them.

The captioning benchmarks use Stanford's PTBTokenizer (CoreNLP 3.4.1, in Java) and drop punctuation (tylin/coco-caption,
pycocoevalcap/tokenizer/ptbtokenizer.py). These are the same rules of the Penn Treebank for what captions contain.
"""

from __future__ import annotations

import re

PUNCTUATION = {".", "?", "!", ",", ":", "-", "--", "...", ";", "'", "`", '"'}
# The benchmarks mean to drop parentheses, too, but name them in capitals, while the tokens are in small letters.
NAMES = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "£": "#",
    "€": "$",
    "¢": "cents",
}
SAME = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...", "\u2013": " - ", "\u2014": " - "}
)
_TITLES = "mr|mrs|ms|dr|st|jr|sr|vs|ave|mt|ft|gen|sen|rep|prof|rev|capt|gov|inc|co|corp|ltd|etc"
_MONTHS = "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
TOKEN = re.compile(
    rf"""
    https?://\S+ | [\w.+-]{{1,64}}@[\w-]+\.[\w.]+                  # addresses
    | (?<![\w.])(?:[a-z]\.)+[a-z]\. | (?<![\w.])[a-wyz]\.(?!\w)  # a.m., b.
    | \b(?:{_TITLES}|{_MONTHS})\. | \bno\.(?=\s*\d)              # other abbreviations keep their period, too
    | \b(?:gon|wan)(?=na\b) | (?<=gon|wan)na\b | \bgot(?=ta\b) | (?<=got)ta\b
    | \b(?:lem|gim)(?=me\b) | (?<=lem|gim)me\b | \bcan(?=not\b) | (?<=can)not\b
    | 't(?=is\b|was\b) | (?<!\w)'n\b'? | '\d0s\b | \by'(?=all\b)
    | \b[a-z]+?(?=n't\b) | n't\b | '(?:s|re|ve|ll|d|m)\b         # do n't, it 's
    | (?:o|l|d|ma)'[a-z]+                                        # o'clock
    | \d+:\d\d(?=[ap]m\b)                                        # 3:15 pm
    | (?:@|\#(?=[a-z]))?\w+(?:(?:[-./_]|(?<=\d)[,:](?=\d))\w+)*  # words, and numbers such as 1,000
    | \.\.\. | -+ | [?!]+ | \S
    """,
    re.VERBOSE,
)


def words(caption: str) -> list[str]:
    """The tokens of a caption in small letters, without punctuation."""
    tokens = TOKEN.findall(caption.translate(SAME).lower())
    return [NAMES.get(token, token) for token in tokens if token not in PUNCTUATION]
