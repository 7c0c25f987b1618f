"""ChatML with image slots: messages become runs of ids, each trained on or not, with image slots between them.

Template: `<|im_start|>role\\ncontent<|im_end|>\\n`, in the Yi variant of NVLM behind a token that begins every
conversation; loss on the assistant's words and its `<|im_end|>` (NVLM appendix E).

Text and tags are tokenised apart, as NVLM was trained, or joined, as its Hugging Face release does: there all text
between two special tokens is one, so that the `>` of `<Image>` and the `<` of the first tag may become one token. An
assistant's words are apart from their header in both, since generation begins behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from nvlm.batch import BadRecord, Record
from nvlm.config import IMAGE_MARK
from nvlm.data.tokenizer import ChatTokenizer

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Run:
    """Token ids with or without loss, or an image slot (`image` is its number)."""

    ids: tuple[int, ...] = ()
    trained: bool = False
    image: int | None = None


def texts(messages: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(role, text) of each message; content may be text or a list of {"type": "image"|"text"} parts."""
    turns = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadRecord(f"role {role!r}, expected one of {', '.join(ROLES)}")
        if isinstance(content, list):
            content = "".join(IMAGE_MARK if part.get("type") == "image" else part.get("text", "") for part in content)
        if not isinstance(content, str):
            raise BadRecord(f"content of a {role} message is {type(content).__name__}, expected text")
        turns.append((role, content))
    return turns


def place_images(turns: list[tuple[str, str]], images: int) -> list[tuple[str, str]]:
    """Make marks and images agree: missing marks are put before the first user turn's text.

    Raises BadRecord for a conversation without a user turn, or with more marks than images.
    """
    first_user = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
    if first_user is None:
        raise BadRecord("no user turn")
    marks = sum(text.count(IMAGE_MARK) for _, text in turns)
    if marks > images:
        raise BadRecord(f"{marks} {IMAGE_MARK} marks, but {images} images")
    role, text = turns[first_user]
    return [
        *turns[:first_user],
        (role, f"{IMAGE_MARK}\n" * (images - marks) + text),
        *turns[first_user + 1 :],
    ]


def chatml(
    turns: Sequence[tuple[str, str]],
    tokenizer: ChatTokenizer,
    system: str | None = None,
    first_tags: Sequence[str] | None = None,
) -> list[Run]:
    """The conversation as runs. `system` stands first unless the conversation brings its own.

    `first_tags`: the tag that stands first in each image's slot, to be tokenised joined with the text before it; None
    to tokenise apart. Joined, an image in an assistant's turn raises BadRecord.
    """
    if system and turns[0][0] != "system":
        turns = [("system", system), *turns]
    runs: list[Run] = [] if tokenizer.bos is None else [Run((tokenizer.bos,))]
    images = 0
    for role, text in turns:
        trained = role == "assistant"
        runs.append(Run((tokenizer.im_start,)))
        if first_tags is None or trained:
            runs += _apart(role, text, images, tokenizer)
        else:
            runs += _joined(role, text, images, tokenizer, first_tags)
        runs += [Run((tokenizer.im_end,), trained), Run(tokenizer.encode("\n"))]
        images += text.count(IMAGE_MARK)
        if first_tags is not None and trained and IMAGE_MARK in text:
            raise BadRecord("an image in an assistant's turn, which data.tokenize=joined has no form for")
    return runs


def _apart(role: str, text: str, image: int, tokenizer: ChatTokenizer) -> list[Run]:
    runs, trained = [Run(tokenizer.encode(f"{role}\n"))], role == "assistant"
    for part, fragment in enumerate(text.split(IMAGE_MARK)):
        if part:
            slot = Run(image=image + part - 1)
            runs += [Run(tokenizer.encode("<Image>")), slot, Run(tokenizer.encode("</Image>"))]
        runs.append(Run(tokenizer.encode(fragment), trained))
    return runs


def _joined(role: str, text: str, image: int, tokenizer: ChatTokenizer, first_tags: Sequence[str]) -> list[Run]:
    before, *behind = f"{role}\n{text}".split(IMAGE_MARK)
    runs = []
    for number, fragment in enumerate(behind, start=image):
        runs += [Run(tokenizer.encode(f"{before}<Image>{first_tags[number]}")), Run(image=number)]
        before = f"</Image>{fragment}"
    return [*runs, Run(tokenizer.encode(before))]


def prompt(
    turns: Sequence[tuple[str, str]],
    tokenizer: ChatTokenizer,
    system: str | None = None,
    first_tags: Sequence[str] | None = None,
) -> list[Run]:
    """The conversation, and an assistant's turn opened behind it: what generation starts from."""
    if turns[-1][0] == "assistant":
        raise BadRecord("the last turn is the assistant's, expected a user's")
    opened = Run((tokenizer.im_start, *tokenizer.encode("assistant\n")))
    return [*chatml(turns, tokenizer, system, first_tags), opened]


def first_question(record: Record) -> Record:
    """`record` up to its first assistant turn, with the images that stand there. Raises BadRecord."""
    turns = place_images(texts(record.messages), len(record.images))
    asked = list(takewhile(lambda turn: turn[0] != "assistant", turns))
    images = sum(text.count(IMAGE_MARK) for _, text in asked)
    messages = [{"role": role, "content": text} for role, text in asked]
    return replace(record, messages=messages, images=record.images[:images])
