"""The evaluate command. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.commands.mistakes import answered_or_helped
from nvlm.commands.score import score, scores_files
from nvlm.config.values import problem

HELP = """python launch/evaluate.py answers=FILE.jsonl[,FILE.jsonl] metric=NAME

answers=FILE    score the answers of a file; of two files, also the difference on the questions that both have
metric=NAME     vqa_accuracy, textvqa_accuracy, anls, relaxed_accuracy, exact_match, ocrbench, choice, mmmu, mathvista,
                cider or gsm8k"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return answered_or_helped(arguments, HELP, _answer)


def _answer(arguments: Sequence[str]) -> int:
    if scores_files(arguments):
        return score(arguments)
    raise problem("command line", "nothing to evaluate", "answers=FILE metric=NAME", "see --help")
