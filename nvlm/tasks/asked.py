"""What a row of a benchmark asks, and the question that a task's prompt makes of it. Imports no torch."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvlm.config.task import TaskConfig
from nvlm.data.forms.pictures import found, picture
from nvlm.data.messages import NoAnswer, literal, with_marks
from nvlm.data.parts import kind_of
from nvlm.data.record import BadRecord, Record
from nvlm.tasks.question import Question

Image = Path | bytes
"""The file of an image, or its bytes."""
_NUMBERED = re.compile(r"<image (\d+)>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A row's question as it was published, before a prompt is added.

    `images` go before the text; `numbered` are images that `<image N>` in the text or in an option stands for. Both
    texts are plain: `<image>` in them is no mark. The other fields are those of a Question.
    """

    id: str
    text: str
    references: tuple[str, ...]
    images: tuple[Image, ...] = ()
    numbered: Mapping[int, Image] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    type: str = ""
    category: str = ""
    shown: str = ""


def question_of(asked: Asked, task: TaskConfig) -> Question:
    """The question in the prompt of `task`. Raises BadRecord for a missing image, and NoAnswer without a reference."""
    if not asked.references:
        raise NoAnswer(f"no answer: the split {task.split} was published without answers, or this row has none")
    for image in all_images(asked):
        if isinstance(image, Path) and not image.is_file():
            raise BadRecord(f"{named(image)}: no such image")
    prompt = task.open_prompt if task.open_prompt and not asked.options else task.prompt or "{question}"
    said = prompt.format(question=asked.text.strip(), options=lettered(asked.options))
    text, images = _placed(said, asked.numbered) if asked.numbered else (literal(said), [])
    return Question(
        record=Record(asked.id, [{"role": "user", "content": text}], [*asked.images, *images]),
        references=asked.references,
        options=asked.options,
        type=asked.type,
        category=asked.category,
        shown=asked.shown,
    )


def named(image: Path) -> str:
    """An image's file with its folder, for messages."""
    return f"{image.parent.name}/{image.name}"


def all_images(asked: Asked) -> Iterator[Image]:
    """The images of a question."""
    yield from asked.images
    yield from asked.numbered.values()


def _placed(text: str, numbered: Mapping[int, Image]) -> tuple[str, list[Image]]:
    """`text` with its images in place of their numbers; those that it does not mention go before it."""
    pieces = _NUMBERED.split(text)
    mentioned = [int(number) for number in pieces[1::2]]
    if unknown := sorted(set(mentioned) - set(numbered)):
        raise BadRecord(f"the question mentions <image {unknown[0]}>, which the row does not have")
    before = [number for number in numbered if number not in mentioned]
    texts = [*([""] if before else []), *["\n"] * (len(before) - 1), *([f"\n{pieces[0]}"] if before else pieces[:1])]
    return with_marks([*texts, *pieces[2::2]]), [numbered[number] for number in (*before, *mentioned)]


def letters(count: int) -> str:
    """The letters of `count` options. Raises BadRecord for more than 26."""
    if count > len(string.ascii_uppercase):
        raise BadRecord(f"{count} options, expected at most {len(string.ascii_uppercase)}")
    return string.ascii_uppercase[:count]


def lettered(options: Sequence[str]) -> str:
    """The options as "A. first" and so on, one a line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(letters(len(options)), options))


def text_of(row: Mapping[str, Any], *keys: str) -> str:
    """The text, or the number as text, under the first of `keys` that the row has. Raises BadRecord."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        if value is not None:
            raise BadRecord(f"`{key}` is {kind_of(value)}, expected text")
    raise BadRecord(f"no `{'` or `'.join(keys)}`")


def word_of(row: Mapping[str, Any], *keys: str) -> str:
    """The same, or an empty text if the row has none of `keys`."""
    return text_of(row, *keys) if any(row.get(key) is not None for key in keys) else ""


def texts_of(row: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """The texts under the first of `keys` that the row has: one or a list; none if it has none. Raises BadRecord."""
    value = next((row[key] for key in keys if row.get(key) is not None), [])
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(text_of({keys[0]: one}, keys[0]) for one in values)


def images_of(row: Mapping[str, Any], root: Path, *keys: str) -> tuple[Image, ...]:
    """The image under the first of `keys` that the row has: bytes, or a path below `root`. Raises BadRecord."""
    value = next((row[key] for key in keys if row.get(key) is not None), None)
    if value is None:
        raise BadRecord(f"no image under `{'` or `'.join(keys)}`")
    return tuple(found([picture(value, f"`{keys[0]}`")], root))
