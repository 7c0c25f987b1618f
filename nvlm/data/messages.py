"""What a record's messages may contain, and where its images go. Imports no torch.

Keys that mean something to other trainers are either supported or refused by name, so that no record is trained
without its image or on a turn that was meant to be excluded. A key whose value is null or empty is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from nvlm.config.data import IMAGE_MARK
from nvlm.data.record import BadRecord, Record

ROLES = ("system", "user", "assistant")
MESSAGE_KEYS = ("role", "content", "loss", "weight")

# Keys of a record that mean something to other trainers, and what to write instead. All other keys are ignored.
_ELSEWHERE = {
    **dict.fromkeys(("image", "image_path", "image_url"), "put the paths of images into the list `images`"),
    **dict.fromkeys(("video", "videos", "audio", "audios"), "only images are supported"),
    **dict.fromkeys(("conversations", "conversation"), "put the dialogue into `messages`"),
    "system": "put it into `messages`, as the first turn",
    **dict.fromkeys(("tools", "functions"), "tools are not supported"),
    **dict.fromkeys(("chosen", "rejected", "rejected_response"), "preferences are not supported"),
    "objects": "write boxes into the text",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: its text with `<image>` marks, and whether it has loss (by default, only an assistant's has)."""

    role: str
    text: str
    learned: bool = False


class NoAnswer(BadRecord):
    """A held-out record without an answer, which cannot be scored."""


def check_row(row: Any) -> None:
    """Raise BadRecord if a line's value is not a record, or if it has a key that means something to other trainers but
    would be ignored here."""
    if isinstance(row, dict) and says(row.get("conversations")) and "messages" not in row:
        raise BadRecord(
            "`conversations` (LLaVA's format) instead of `messages`: data=llava reads it, data=jsonl reads messages "
            "with role and content"
        )
    check_keys(row)
    if not isinstance(row.get("messages"), list):
        raise BadRecord("no list of messages")


def check_keys(row: Any, read: Sequence[str] = ()) -> None:
    """Raise BadRecord if `row` is not an object, or has a key outside `read` that means something to other trainers."""
    if not isinstance(row, dict):
        raise BadRecord(f"{_kind(row)}, expected an object")
    for key, instead in _ELSEWHERE.items():
        if key not in read and says(row.get(key)):
            raise BadRecord(f"key `{key}` is not read: {instead}")


def read_turns(messages: Sequence[Any]) -> list[Turn]:
    """The messages as turns. Raises BadRecord for anything that is not supported."""
    return [_turn(message) for message in messages]


def says(value: Any) -> bool:
    """False for null and anything empty, with which table formats fill unused columns."""
    return value is not None and value != "" and value != [] and value != {}


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise BadRecord(f"a message is {_kind(message)}, expected an object")
    role = message.get("role")
    if role not in ROLES:
        raise BadRecord(f"role {role!r}, expected one of {', '.join(ROLES)}")
    _refuse_others(message, MESSAGE_KEYS, f"message of role {role}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise BadRecord(f"content of a message of role {role} is {_kind(content)}, expected text")
    return Turn(role, _characters(content), _learned(role, message))


def _part(part: Any) -> str:
    """The text of one part of a content list, or the mark of its image."""
    if not isinstance(part, Mapping):
        raise BadRecord(f"a part of a content list is {_kind(part)}, expected an object")
    kind = part.get("type")
    if kind == "image":
        _refuse_others(part, ("type",), "part of type image")
        return IMAGE_MARK
    if kind != "text":
        raise BadRecord(f"a part of type {kind!r}, expected text or image (put paths into the record's `images`)")
    _refuse_others(part, ("type", "text"), "part of type text")
    if not isinstance(part.get("text"), str):
        raise BadRecord(f"the text of a part is {_kind(part.get('text'))}, expected text")
    return part["text"]


def _refuse_others(values: Mapping[Any, Any], known: Sequence[str], what: str) -> None:
    for key, value in values.items():
        if key not in known and says(value):
            raise BadRecord(f"key {key!r} of a {what} is not supported, expected only {', '.join(known)}")


def _learned(role: str, message: Mapping[str, Any]) -> bool:
    """Whether a turn has loss: an assistant's has, unless `loss` is false or `weight` is 0."""
    said = {}
    for key in ("loss", "weight"):
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRecord(f"{key} {value!r} of a message of role {role}, expected true, false, 1 or 0")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise BadRecord(f"loss and weight of a message of role {role} contradict each other")
    wanted = next(iter(said.values()), role == "assistant")
    if wanted and role != "assistant":
        raise BadRecord(
            f"{next(iter(said))} asks for loss on a message of role {role}: only the assistant's can have loss"
        )
    return wanted


def _characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"U+{ord(text[error.start]):04X} in a message, half of a surrogate pair") from None
    return text


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)


def place_images(turns: Sequence[Turn], images: int) -> list[Turn]:
    """The turns with a mark for each image. If the text has no marks, all go before the first user turn's text.

    Raises BadRecord for a conversation without a user turn, and if the text has some marks, but not one per image.
    """
    first_user = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first_user is None:
        raise BadRecord("no user turn")
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks == images:
        return list(turns)
    if marks:
        raise BadRecord(f"{marks} {IMAGE_MARK} marks, but {images} images: expected a mark for each image, or none")
    placed = replace(turns[first_user], text=f"{IMAGE_MARK}\n" * images + turns[first_user].text)
    return [*turns[:first_user], placed, *turns[first_user + 1 :]]


def check_learns(turns: Sequence[Turn]) -> None:
    """Raise BadRecord if there is nothing to learn: no assistant turn with loss, or only empty ones."""
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRecord("no assistant turn to learn from")
    learned = [turn for turn in turns if turn.learned]
    if not learned:
        raise BadRecord("no assistant turn to learn from: all have loss false or weight 0")
    if not any(turn.text.strip() for turn in learned):
        raise BadRecord("no text to learn: every assistant turn with loss is empty")


def first_question(record: Record) -> tuple[Record, str]:
    """`record` before its first assistant turn with loss and text, with the images up to there, and that turn's text.

    Raises BadRecord, in particular NoAnswer if there is no such turn.
    """
    turns = place_images(read_turns(record.messages), len(record.images))
    asked = list(takewhile(lambda turn: not (turn.learned and turn.text.strip()), turns))
    if len(asked) == len(turns):
        raise NoAnswer("no assistant turn with an answer to compare with")
    images = sum(turn.text.count(IMAGE_MARK) for turn in asked)
    messages = [{"role": turn.role, "content": turn.text} for turn in asked]
    return replace(record, messages=messages, images=record.images[:images]), turns[len(asked)].text
