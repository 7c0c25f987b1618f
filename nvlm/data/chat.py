"""ChatML with image slots: messages become runs of ids, each trained on or not, with image slots between them.

Template: `<|im_start|>role\\ncontent<|im_end|>\\n`, in the Yi variant of NVLM behind a token that begins every
conversation; loss on the assistant's words and its `<|im_end|>` (NVLM appendix E).

Text and tags are tokenised apart, as NVLM was trained, or joined, as its Hugging Face release does: there all text
between two special tokens is one, so that the `>` of `<Image>` and the `<` of the first tag may become one token. An
assistant's words are apart from their header in both, since generation begins behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvlm.config import IMAGE_MARK
from nvlm.data.messages import Turn
from nvlm.data.tokenizer import ChatTokenizer
from nvlm.record import BadRecord


@dataclass(frozen=True, slots=True)
class Run:
    """Token ids with or without loss, or an image slot (`image` is its number)."""

    ids: tuple[int, ...] = ()
    trained: bool = False
    image: int | None = None


def chatml(
    turns: Sequence[Turn],
    tokenizer: ChatTokenizer,
    system: str | None = None,
    first_tags: Sequence[str] | None = None,
) -> list[Run]:
    """The conversation as runs. `system` stands first unless the conversation brings its own.

    `first_tags`: the tag that stands first in each image's slot, to be tokenised joined with the text before it; None
    to tokenise apart. Joined, an image in an assistant's turn raises BadRecord.
    """
    if system and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    runs: list[Run] = [] if tokenizer.bos is None else [Run((tokenizer.bos,))]
    images = 0
    for turn in turns:
        words = turn.role == "assistant"
        runs.append(Run((tokenizer.im_start,)))
        if first_tags is None or words:
            runs += _apart(turn, images, tokenizer)
        else:
            runs += _joined(turn, images, tokenizer, first_tags)
        runs += [Run((tokenizer.im_end,), turn.learned), Run(tokenizer.encode("\n"))]
        images += turn.text.count(IMAGE_MARK)
        if first_tags is not None and words and IMAGE_MARK in turn.text:
            raise BadRecord("an image in an assistant's turn, which data.tokenize=joined has no form for")
    return runs


def _apart(turn: Turn, image: int, tokenizer: ChatTokenizer) -> list[Run]:
    runs = [Run(tokenizer.encode(f"{turn.role}\n"))]
    for part, fragment in enumerate(turn.text.split(IMAGE_MARK)):
        if part:
            slot = Run(image=image + part - 1)
            runs += [Run(tokenizer.encode("<Image>")), slot, Run(tokenizer.encode("</Image>"))]
        runs.append(Run(tokenizer.encode(fragment), turn.learned))
    return runs


def _joined(turn: Turn, image: int, tokenizer: ChatTokenizer, first_tags: Sequence[str]) -> list[Run]:
    before, *behind = f"{turn.role}\n{turn.text}".split(IMAGE_MARK)
    runs = []
    for number, fragment in enumerate(behind, start=image):
        runs += [Run(tokenizer.encode(f"{before}<Image>{first_tags[number]}")), Run(image=number)]
        before = f"</Image>{fragment}"
    return [*runs, Run(tokenizer.encode(before))]


def prompt(
    turns: Sequence[Turn],
    tokenizer: ChatTokenizer,
    system: str | None = None,
    first_tags: Sequence[str] | None = None,
) -> list[Run]:
    """The conversation, and an assistant's turn opened behind it: what generation starts from."""
    if turns[-1].role == "assistant":
        raise BadRecord("the last turn is the assistant's, expected a user's")
    opened = Run((tokenizer.im_start, *tokenizer.encode("assistant\n")))
    return [*chatml(turns, tokenizer, system, first_tags), opened]
