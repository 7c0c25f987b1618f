"""Rows of plain columns as questions and answers: the tasks of NVLM's training data (appendix E). Imports no torch.

Columns hold plain text: `<image>` in them is no mark, and images and videos go before the question. The wordings are in
wording.yaml. What is drawn, a wording or the region that is asked for, depends only on the seed and the row's name.
"""

from __future__ import annotations

import string
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nvlm.data.draw import drawn
from nvlm.data.forms.boxes import box_text
from nvlm.data.forms.clips import VIDEO_KEYS, row_videos
from nvlm.data.forms.pictures import IMAGE_KEYS, found, row_images
from nvlm.data.images import image_size
from nvlm.data.messages import check_keys, literal
from nvlm.data.parts import kind_of, shown
from nvlm.data.record import BadRecord, Record, identity_of
from nvlm.data.sources.rows import Form
from nvlm.data.video.clip import Video


@dataclass(frozen=True, slots=True)
class Plain:
    """A row of plain columns, its images and videos, and what is drawn for it: `draw(what, n)` is a number below n."""

    row: Mapping[str, Any]
    images: list
    draw: Callable[[str, int], int]

    def text(self, column: str) -> str:
        """The text, or the number, in a column. Raises BadRecord if there is none."""
        return _text(self.row.get(column), f"`{column}`")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the wordings of a task refer to, by name, and the answer. `answers` and `options`: as in a Record."""

    said: dict[str, str]
    answer: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def task_form(task: str, seed: int) -> Form:
    """The form of the rows of `task`."""
    ask, wordings = _ASK[task], _wordings()[task]

    def read(row: Any, name: str, root: Path) -> Record:
        check_keys(row, (*IMAGE_KEYS, *VIDEO_KEYS))
        images = [*found(row_images(row), root), *row_videos(row, (), root)]
        if not images and task != "math":
            raise BadRecord(f"no image or video, which the task {task} needs")
        plain = Plain(row, images, lambda what, count: drawn(seed, name, what, count))
        asked = ask(plain)
        question = wordings[plain.draw("wording", len(wordings))].format(**asked.said)
        turns = (("user", question), ("assistant", asked.answer))
        messages = [{"role": role, "content": literal(text)} for role, text in turns]
        return Record(identity_of(row, name), messages, images, asked.answers, asked.options)

    return read


@cache
def _wordings() -> dict[str, list[str]]:
    import yaml

    return yaml.safe_load(Path(__file__).with_name("wording.yaml").read_text(encoding="utf-8"))


def _text(value: Any, what: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRecord(f"{what} is {kind_of(value)}, expected text")
    if not value.strip():
        raise BadRecord(f"{what} is empty")
    return value.strip()


def _caption(plain: Plain) -> Asked:
    return Asked({}, plain.text("caption"))


def _vqa(plain: Plain) -> Asked:
    """`answer`: a text, or what several people answered, of which the most frequent is taken."""
    given = plain.row.get("answer")
    if not isinstance(given, list):
        return Asked({"question": plain.text("question")}, plain.text("answer"))
    answers = tuple(_text(one, f"answer {place} of {len(given)}") for place, one in enumerate(given, start=1))
    if not answers:
        raise BadRecord("`answer` is empty")
    return Asked({"question": plain.text("question")}, Counter(answers).most_common(1)[0][0], answers)


def _choice(plain: Plain) -> Asked:
    """`options`: texts; `answer`: the right one's letter, its text or its place, counted from 0."""
    options = plain.row.get("options")
    if not isinstance(options, list) or not 2 <= len(options) <= 26:
        raise BadRecord("`options` is not a list of 2 to 26 options")
    texts = [_text(option, f"option {place} of {len(options)}") for place, option in enumerate(options, start=1)]
    letters = string.ascii_uppercase[: len(texts)]
    shown = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts))
    said = {"question": plain.text("question"), "options": shown}
    return Asked(said, letters[_right(plain.row.get("answer"), texts)], options=tuple(texts))


def _right(answer: Any, options: list[str]) -> int:
    """The place of the right option."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        places = {answer} & set(range(len(options)))
    else:
        said = _text(answer, "`answer`")
        letters = string.ascii_uppercase[: len(options)]
        places = {place for place, option in enumerate(options) if said in (option, letters[place])}
    if len(places) != 1:
        which = "several" if places else "none"
        raise BadRecord(f"`answer` {shown(answer)} is {which} of the {len(options)} options")
    return places.pop()


def _regions(plain: Plain) -> list[tuple[str, str]]:
    """The text and the box, as text, of each region: `text` and `boxes`, two lists, or one text and one box."""
    if any(isinstance(one, Video) for one in plain.images):
        raise BadRecord("a video, expected an image: boxes belong to one image")
    if len(plain.images) != 1:
        raise BadRecord(f"{len(plain.images)} images, expected 1: boxes belong to one image")
    texts, boxes = plain.row.get("text"), plain.row.get("boxes")
    if isinstance(texts, str):
        texts, boxes = [texts], boxes if _is_list_of_boxes(boxes) else [boxes]
    if not isinstance(texts, list) or not isinstance(boxes, list) or not texts or len(texts) != len(boxes):
        raise BadRecord("`text` and `boxes` are not two lists of the same length, at least 1")
    size = image_size(plain.images[0], sys.maxsize)  # data.max_pixels is checked when the record is outlined
    places = [f"{place} of {len(texts)}" for place in range(1, len(texts) + 1)]
    return [
        (_text(text, f"text {place}"), box_text(box, size, f"box {place}"))
        for text, box, place in zip(texts, boxes, places)
    ]


def _is_list_of_boxes(boxes: Any) -> bool:
    return isinstance(boxes, list) and len(boxes) == 1 and isinstance(boxes[0], list)


def _region(plain: Plain) -> dict[str, str]:
    regions = _regions(plain)
    text, box = regions[plain.draw("region", len(regions))]
    return {"text": text, "box": box}


def _ocr(plain: Plain) -> Asked:
    return Asked({}, "".join(f"<ref>{text}</ref>{box}" for text, box in _regions(plain)))


def _grounded_ocr(plain: Plain) -> Asked:
    region = _region(plain)
    return Asked(region, region["text"])


def _referring(plain: Plain) -> Asked:
    region = _region(plain)
    return Asked(region, region["box"])


def _transcription(plain: Plain) -> Asked:
    return Asked({}, plain.text("text"))


def _math(plain: Plain) -> Asked:
    return Asked({"question": plain.text("question")}, plain.text("answer"))


_ASK: dict[str, Callable[[Plain], Asked]] = {
    "caption": _caption,
    "vqa": _vqa,
    "choice": _choice,
    "ocr": _ocr,
    "grounded_ocr": _grounded_ocr,
    "referring": _referring,
    "transcription": _transcription,
    "math": _math,
}
