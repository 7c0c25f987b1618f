"""ChatML's two other tokenisations of text with images, in which the first tag is a part of the text before it.

`joined`, as in NVLM-D's Hugging Face release: all text between two special tokens together, so that the `>` of
`<Image>` and the `<` of the first tag may become one token. `vllm`: `<Image>` and the first tag together, `</Image>`
and the following line end each separately. In both an assistant's text is tokenised apart from its header.
"""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.config.data import IMAGE_MARK
from nvlm.data.messages import Turn
from nvlm.data.record import BadRecord
from nvlm.data.text.assemble import Run
from nvlm.data.text.tokenizer import ChatTokenizer


def with_first_tags(
    turns: Sequence[Turn], tokenizer: ChatTokenizer, tokenize: str, first_tags: Sequence[str], reply: bool
) -> list[Run]:
    """The conversation as runs. Raises BadRecord for an image in an assistant's turn and, with vllm, for an image that
    is not on its own line."""
    form = {"joined": _joined, "vllm": _as_vllm}[tokenize]
    start, end = (tokenizer.specials[name].number for name in ("<|im_start|>", "<|im_end|>"))
    runs: list[Run] = [] if tokenizer.bos is None else [Run((tokenizer.bos,))]
    images = 0
    for turn in turns:
        runs.append(Run((start,)))
        if turn.role == "assistant":
            if turn.images:
                raise BadRecord(f"an image in an assistant's turn, which data.tokenize={tokenize} does not support")
            runs += [Run(tokenizer.encode("assistant\n")), Run(tokenizer.encode(turn.texts[0]), turn.learned)]
        else:
            runs += form(turn, images, tokenizer, first_tags)
        runs += [Run((end,), turn.learned), Run(tokenizer.encode("\n"))]
        images += turn.images
    return [*runs, Run((start, *tokenizer.encode("assistant\n")))] if reply else runs


def _joined(turn: Turn, image: int, tokenizer: ChatTokenizer, first_tags: Sequence[str]) -> list[Run]:
    first, *behind = turn.texts
    before, runs = f"{turn.role}\n{first}", []
    for number, fragment in enumerate(behind, start=image):
        runs += [Run(tokenizer.encode(f"{before}<Image>{first_tags[number]}")), Run(image=number)]
        before = f"</Image>{fragment}"
    return [*runs, Run(tokenizer.encode(before))]


def _as_vllm(turn: Turn, image: int, tokenizer: ChatTokenizer, first_tags: Sequence[str]) -> list[Run]:
    if any(IMAGE_MARK in text for text in turn.texts):
        raise BadRecord(f"{IMAGE_MARK} as a literal text, which vLLM takes for an image")
    first, *behind = turn.texts
    # vLLM searches for the tokens of the mark and its line end, which differ if another line end follows.
    lines_end_before = all(text.endswith("\n") for text in (f"\n{first}", *behind)[: len(behind)])
    if not lines_end_before or not all(text[:1] == "\n" != text[1:2] for text in behind):
        raise BadRecord(f"{IMAGE_MARK} inside a line or before an empty line, where vLLM does not find it")
    runs = [Run(tokenizer.encode(f"{turn.role}\n{first}"))]
    for number, fragment in enumerate(behind, start=image):
        runs += [Run(tokenizer.encode(f"<Image>{first_tags[number]}")), Run(image=number)]
        runs += [Run(tokenizer.encode(part)) for part in ("</Image>", "\n", fragment[1:])]
    return runs
