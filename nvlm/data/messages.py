"""What a record's messages may contain, and where its images go. Imports no torch.

Keys that mean something to other trainers are either supported or refused by name, so that no record is trained
without its image or on a turn that was meant to be excluded. A key whose value is null or empty is ignored.

In a text, `<image>` marks an image and a backslash escapes the mark: n backslashes directly before it stand for n // 2
backslashes, followed by an image if n is even and by the literal text `<image>` if n is odd.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from nvlm.config.data import IMAGE_MARK
from nvlm.data.parts import image_of, is_image, kind_of, refuse_others, says, shown, text_of
from nvlm.data.record import BadRecord, Record

DOCUMENT = "document"  # the role of a record's only message if it is a text without roles
ROLES = ("system", "user", "assistant", DOCUMENT)
MESSAGE_KEYS = ("role", "content", "loss", "weight")
_MARK = re.compile(rf"(?<!\\)(\\*+){IMAGE_MARK}")  # with all backslashes before it, in linear time

# Keys of a record that mean something to other trainers, and what to write instead. All other keys are ignored.
_ELSEWHERE = {
    **dict.fromkeys(("image_path", "image_url"), "put the paths of images into `images`"),
    **dict.fromkeys(("video", "videos"), "only conversations (`messages`) may have videos"),
    **dict.fromkeys(("audio", "audios"), "sound is not supported"),
    "conversation": "put the dialogue into `messages`",
    "system": "put it into `messages`, as the first turn",
    **dict.fromkeys(("tools", "functions"), "tools are not supported"),
    **dict.fromkeys(("chosen", "rejected", "rejected_response"), "preferences are not supported"),
    "objects": "write boxes into the text",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: n + 1 texts around n images, and whether it has loss (by default, only an assistant's and a
    document's have)."""

    role: str
    texts: tuple[str, ...]
    learned: bool = False

    @property
    def images(self) -> int:
        """Number of its images."""
        return len(self.texts) - 1

    @property
    def blank(self) -> bool:
        """Whether it has neither text nor images."""
        return not self.images and not self.texts[0].strip()


class NoAnswer(BadRecord):
    """A held-out record without an answer, which cannot be scored."""


def check_keys(row: Any, read: Sequence[str] = ()) -> None:
    """Raise BadRecord if `row` is not an object, or has a key outside `read` that means something to other trainers."""
    if not isinstance(row, dict):
        raise BadRecord(f"{kind_of(row)}, expected an object")
    for key, instead in _ELSEWHERE.items():
        if key not in read and says(row.get(key)):
            raise BadRecord(f"key `{key}` is not read: {instead}")


def split_marks(text: str) -> tuple[str, ...]:
    """The n + 1 texts around the n marks of `text`, without escapes."""
    if IMAGE_MARK not in text:
        return (text,)
    texts, start = [""], 0
    for found in _MARK.finditer(text):
        backslashes = len(found[1])
        texts[-1] += text[start : found.start()] + "\\" * (backslashes // 2)
        if backslashes % 2:
            texts[-1] += IMAGE_MARK
        else:
            texts.append("")
        start = found.end()
    texts[-1] += text[start:]
    return tuple(texts)


def literal(text: str) -> str:
    """`text` escaped so that it is read as it is and has no marks: for texts from the web.

    Before a mark, write a text with `with_marks`, since a backslash at its end would escape the mark.
    """
    return _MARK.sub(lambda found: f"{2 * found[1]}\\{IMAGE_MARK}", text)


def with_marks(texts: Sequence[str]) -> str:
    """n + 1 texts as one with n marks between them: the inverse of `split_marks`."""
    *before, last = [literal(text) for text in texts]
    ends = [text[len(text.rstrip("\\")) :] for text in before]
    return "".join(f"{text}{end}{IMAGE_MARK}" for text, end in zip(before, ends)) + last


def read_turns(messages: Sequence[Any]) -> list[Turn]:
    """The messages as turns. Raises BadRecord for anything that is not supported."""
    turns = [_turn(message) for message in messages]
    if len(turns) > 1 and any(turn.role == DOCUMENT for turn in turns):
        raise BadRecord(f"a message of role {DOCUMENT} among {len(turns)} messages, expected it to be the only one")
    return turns


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise BadRecord(f"a message is {kind_of(message)}, expected an object")
    role = message.get("role")
    if role not in ROLES:
        raise BadRecord(f"role {shown(role)}, expected one of {', '.join(ROLES)}")
    refuse_others(message, MESSAGE_KEYS, f"message of role {role}")
    content = message.get("content")
    if isinstance(content, list):
        texts = _texts_of_parts(content)
    elif isinstance(content, str):
        texts = split_marks(content)
    else:
        raise BadRecord(f"content of a message of role {role} is {kind_of(content)}, expected text")
    for text in texts:
        _check_characters(text)
    return Turn(role, texts, _learned(role, message))


def _texts_of_parts(parts: Sequence[Any]) -> tuple[str, ...]:
    """The texts around the images of a content list: those of its parts and of the marks in its texts."""
    texts: list[list[str]] = [[]]
    for part in parts:
        if is_image(part):
            image_of(part)
            first, *others = "", ""
        else:
            first, *others = split_marks(text_of(part))
        texts[-1].append(first)
        texts += [[text] for text in others]
    return tuple("".join(pieces) for pieces in texts)


def _learned(role: str, message: Mapping[str, Any]) -> bool:
    """Whether a turn has loss: an assistant's or a document has, unless `loss` is false or `weight` is 0."""
    said = {}
    for key in ("loss", "weight"):
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRecord(f"{key} {shown(value)} of a message of role {role}, expected true, false, 1 or 0")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise BadRecord(f"loss and weight of a message of role {role} contradict each other")
    may_learn = role in ("assistant", DOCUMENT)
    wanted = next(iter(said.values()), may_learn)
    if wanted and not may_learn:
        raise BadRecord(
            f"{next(iter(said))} asks for loss on a message of role {role}: only the assistant's can have loss"
        )
    return wanted


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"U+{ord(text[error.start]):04X} in a message, half of a surrogate pair") from None


def place_images(turns: Sequence[Turn], images: int) -> list[Turn]:
    """The turns with a place for each image. If they have none, all images go before the first user turn's text.

    Raises BadRecord for a conversation without a user turn, and if there are some places, but not one per image. A
    document must have a place for each image.
    """
    first = next((i for i, turn in enumerate(turns) if turn.role in ("user", DOCUMENT)), None)
    if first is None:
        raise BadRecord("no user turn")
    marks = sum(turn.images for turn in turns)
    if marks == images:
        return list(turns)
    document = turns[first].role == DOCUMENT
    if marks or document:
        expected = "a mark for each image" + ("" if document else ", or none")
        raise BadRecord(f"{marks} {IMAGE_MARK} marks, but {images} images: expected {expected}")
    begin, *rest = turns[first].texts
    placed = replace(turns[first], texts=("", *["\n"] * (images - 1), f"\n{begin}", *rest))
    return [*turns[:first], placed, *turns[first + 1 :]]


def check_learns(turns: Sequence[Turn]) -> None:
    """Raise BadRecord if there is nothing to learn: no turn with loss, or only empty ones."""
    if not any(turn.role in ("assistant", DOCUMENT) for turn in turns):
        raise BadRecord("no assistant turn to learn from")
    learned = [turn for turn in turns if turn.learned]
    if not learned:
        which = "a document that has" if turns[0].role == DOCUMENT else "no assistant turn to learn from: all have"
        raise BadRecord(f"{which} loss false or weight 0")
    if turns[0].role == DOCUMENT and not any(text.strip() for text in turns[0].texts):
        raise BadRecord("no text to learn: the document has none")
    if all(turn.blank for turn in learned):
        raise BadRecord("no text to learn: every assistant turn with loss is empty")


def first_question(record: Record) -> tuple[Record, str]:
    """`record` before its first assistant turn with loss and text, with the images up to there, and that turn's text.

    A document is a question if its record has answers, which continue it. Raises BadRecord, in particular NoAnswer if
    there is no such turn.
    """
    if record.answers and any(message.get("role") == DOCUMENT for message in record.messages):
        return record, record.answers[0]
    turns = place_images(read_turns(record.messages), len(record.images))
    asked = list(takewhile(lambda turn: not turn.learned or turn.blank, turns))
    if len(asked) == len(turns) or turns[0].role == DOCUMENT:
        raise NoAnswer("no assistant turn with an answer to compare with")
    images = sum(turn.images for turn in asked)
    messages = [{"role": turn.role, "content": with_marks(turn.texts)} for turn in asked]
    return replace(record, messages=messages, images=record.images[:images]), IMAGE_MARK.join(turns[len(asked)].texts)
