"""ChatML with image slots: messages become runs of ids, each trained on or not, with image slots between them.

Template: `<|im_start|>role\\ncontent<|im_end|>\\n`, in the Yi variant of NVLM behind a token that begins every
conversation; loss on the assistant's words and its `<|im_end|>` (NVLM appendix E).

Text and tags are tokenised in one of three ways. `apart`: each by itself, as NVLM was trained. `joined`, as NVLM-D's
Hugging Face release does it: all text between two special tokens is one, so that the `>` of `<Image>` and the `<` of
the first tag may become one token. `vllm`: `<Image>` and the first tag are one text, `</Image>` and the line end
behind it are texts by themselves. In all three an assistant's words are apart from their header, since generation
begins behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nvlm.config.data import IMAGE_MARK
from nvlm.data.messages import Turn
from nvlm.data.record import BadRecord
from nvlm.data.tokenizer import ChatTokenizer

# vLLM looks for the tokens of the mark and its line end. Before a further line end they would be others.
_LINE_OF_IMAGE = re.compile(rf"(?m)^{IMAGE_MARK}\n(?!\n)")


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
    tokenize: str = "apart",
    first_tags: Sequence[str] = (),
) -> list[Run]:
    """The conversation as runs. `system` stands first unless the conversation brings its own.

    `tokenize`: apart, joined or vllm, as above. `first_tags`: the tag that stands first in each image's slot, which in
    the latter two is part of the text. There an image in an assistant's turn raises BadRecord, in the last also one
    that does not have a line of its own.
    """
    if system and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    runs: list[Run] = [] if tokenizer.bos is None else [Run((tokenizer.bos,))]
    images = 0
    for turn in turns:
        words = turn.role == "assistant"
        runs.append(Run((tokenizer.im_start,)))
        if tokenize == "apart" or words:
            runs += _apart(turn, images, tokenizer)
        else:
            form = {"joined": _joined, "vllm": _as_vllm}[tokenize]
            runs += form(turn, images, tokenizer, first_tags)
        runs += [Run((tokenizer.im_end,), turn.learned), Run(tokenizer.encode("\n"))]
        images += turn.text.count(IMAGE_MARK)
        if tokenize != "apart" and words and IMAGE_MARK in turn.text:
            raise BadRecord(f"an image in an assistant's turn, which data.tokenize={tokenize} has no form for")
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


def _as_vllm(turn: Turn, image: int, tokenizer: ChatTokenizer, first_tags: Sequence[str]) -> list[Run]:
    before, *behind = _LINE_OF_IMAGE.split(turn.text)
    if len(behind) < turn.text.count(IMAGE_MARK):
        raise BadRecord(f"{IMAGE_MARK} within a line or before an empty one, which vLLM does not find")
    runs = [Run(tokenizer.encode(f"{turn.role}\n{before}"))]
    for number, fragment in enumerate(behind, start=image):
        runs += [Run(tokenizer.encode(f"<Image>{first_tags[number]}")), Run(image=number)]
        runs += [Run(tokenizer.encode(part)) for part in ("</Image>", "\n", fragment)]
    return runs


def prompt(
    turns: Sequence[Turn],
    tokenizer: ChatTokenizer,
    system: str | None = None,
    tokenize: str = "apart",
    first_tags: Sequence[str] = (),
) -> list[Run]:
    """The conversation, and an assistant's turn opened behind it: what generation starts from."""
    if turns[-1].role == "assistant":
        raise BadRecord("the last turn is the assistant's, expected a user's")
    opened = Run((tokenizer.im_start, *tokenizer.encode("assistant\n")))
    return [*chatml(turns, tokenizer, system, tokenize, first_tags), opened]
