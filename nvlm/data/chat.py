"""ChatML with image slots: messages become runs of token ids, with or without loss, and image slots between them.

Template: `<|im_start|>role\\ncontent<|im_end|>\\n`; in NVLM's Yi variant a begin token starts every conversation. The
loss is on the assistant's text and its `<|im_end|>` (NVLM appendix E). A document is its text, all with loss, and the
token that ends a text.

Text and tags are tokenised in one of three ways. `apart`: each separately, as in NVLM's training. `joined`, as in
NVLM-D's Hugging Face release: all text between two special tokens together, so that the `>` of `<Image>` and the `<`
of the first tag may become one token. `vllm`: `<Image>` and the first tag together, `</Image>` and the following line
end each separately. In all three an assistant's text is tokenised apart from its header, where generation starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvlm.config.data import IMAGE_MARK
from nvlm.data.messages import DOCUMENT, Turn
from nvlm.data.record import BadRecord
from nvlm.data.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Run:
    """Token ids with or without loss, or an image slot (`image` is the image's number)."""

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
    """The conversation as runs. `system` is put first unless the conversation has its own system turn.

    `tokenize`: apart, joined or vllm, as above. `first_tags`: the first tag in each image's slot, which is part of the
    text for joined and vllm. With these two, an image in an assistant's turn raises BadRecord; with vllm, so does an
    image that is not on its own line.
    """
    runs: list[Run] = [] if tokenizer.bos is None else [Run((tokenizer.bos,))]
    if turns[0].role == DOCUMENT:
        if tokenize != "apart" and turns[0].images:
            raise BadRecord(f"a document with images, which data.tokenize={tokenize} does not support")
        return [*runs, *_fragments(turns[0], 0, tokenizer), Run((tokenizer.end_of_text,), turns[0].learned)]
    if system and turns[0].role != "system":
        turns = [Turn("system", (system,)), *turns]
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
        images += turn.images
        if tokenize != "apart" and words and turn.images:
            raise BadRecord(f"an image in an assistant's turn, which data.tokenize={tokenize} does not support")
    return runs


def _apart(turn: Turn, image: int, tokenizer: ChatTokenizer) -> list[Run]:
    return [Run(tokenizer.encode(f"{turn.role}\n")), *_fragments(turn, image, tokenizer)]


def _fragments(turn: Turn, image: int, tokenizer: ChatTokenizer) -> list[Run]:
    """The turn's texts, and between them its images from number `image` on, which never have loss."""
    runs = []
    for number, text in enumerate(turn.texts, start=image - 1):
        if number >= image:
            runs += [Run(tokenizer.encode("<Image>")), Run(image=number), Run(tokenizer.encode("</Image>"))]
        runs.append(Run(tokenizer.encode(text), turn.learned))
    return runs


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


def prompt(
    turns: Sequence[Turn],
    tokenizer: ChatTokenizer,
    system: str | None = None,
    tokenize: str = "apart",
    first_tags: Sequence[str] = (),
) -> list[Run]:
    """The conversation, followed by the header of an assistant's turn, or a document without its end: the prompt for
    generation."""
    if turns[-1].role == "assistant":
        raise BadRecord("the last turn is the assistant's, expected a user's")
    if turns[0].role == DOCUMENT:
        return chatml(turns, tokenizer, system, tokenize, first_tags)[:-1]  # continued where its text ends
    opened = Run((tokenizer.im_start, *tokenizer.encode("assistant\n")))
    return [*chatml(turns, tokenizer, system, tokenize, first_tags), opened]
