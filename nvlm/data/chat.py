"""ChatML with image slots: messages become runs of ids, each trained on or not, with image slots between them.

Template (Qwen2, and the Yi variant of NVLM): `<|im_start|>role\\ncontent<|im_end|>\\n`; loss on the assistant's
words and its `<|im_end|>` (NVLM appendix E).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nvlm.batch import BadRecord
from nvlm.data.tokenizer import ChatTokenizer

IMAGE_MARK = "<image>"
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


def chatml(turns: Sequence[tuple[str, str]], tokenizer: ChatTokenizer, system: str | None = None) -> list[Run]:
    """The conversation as runs. `system` stands first unless the conversation brings its own."""
    if system and turns[0][0] != "system":
        turns = [("system", system), *turns]
    runs: list[Run] = []
    images = 0
    for role, text in turns:
        trained = role == "assistant"
        runs.append(Run((tokenizer.im_start, *tokenizer.encode(f"{role}\n"))))
        for part, fragment in enumerate(text.split(IMAGE_MARK)):
            if part:
                # <Image> and the tags are tokenised apart, as NVLM was trained (its HF release joins them).
                runs += [
                    Run(tokenizer.encode("<Image>")),
                    Run(image=images),
                    Run(tokenizer.encode("</Image>")),
                ]
                images += 1
            runs.append(Run(tokenizer.encode(fragment), trained))
        runs += [Run((tokenizer.im_end,), trained), Run(tokenizer.encode("\n"))]
    return runs


def prompt(turns: Sequence[tuple[str, str]], tokenizer: ChatTokenizer, system: str | None = None) -> list[Run]:
    """The conversation up to its first assistant turn, with that turn opened: what generation starts from."""
    first = next((i for i, (role, _) in enumerate(turns) if role == "assistant"), len(turns))
    opened = Run((tokenizer.im_start, *tokenizer.encode("assistant\n")))
    return [*chatml(turns[:first], tokenizer, system), opened]
