"""Task formats: plain columns become questions and answers, wordings are drawn, boxes are scaled and checked."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nvlm.config.data import TASKS
from nvlm.config.values import ConfigError
from nvlm.data.forms import tasks
from nvlm.data.forms.boxes import box_text
from nvlm.data.forms.tasks import drawn, task_form
from nvlm.data.messages import split_marks
from nvlm.data.record import BadRecord
from nvlm.data.sources.registry import build_records

REGIONS = {"text": ["EXIT", "7"], "boxes": [[0, 0, 100, 50], [20, 10, 200, 10, 200, 100, 20, 100]]}
ROWS = {
    "caption": {"caption": "A red car."},
    "vqa": {"question": "What colour?", "answer": "red"},
    "choice": {"question": "What colour?", "options": ["blue", "red"], "answer": "red"},
    "ocr": REGIONS,
    "grounded_ocr": REGIONS,
    "referring": REGIONS,
    "transcription": {"text": "EXIT\n7"},
    "math": {"question": "1 + 1?", "answer": 2},
}
TEXTS = ("EXIT", "7")
BOXES = ("<box>(0,0),(500,500)</box>", "<quad>(100,100),(999,100),(999,999),(100,999)</quad>")


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    return tmp_path


def asked(folder, task: str, name: str = "r:1", seed: int = 0, **keys) -> tuple[str, str]:
    record = task_form(task, seed)({"image": "a.png", **ROWS[task], **keys}, name, folder)
    user, assistant = record.messages
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def test_every_task_has_its_wordings_and_its_columns():
    assert set(TASKS) == set(tasks._ASK) == set(tasks._wordings()) == set(ROWS)
    for wordings in tasks._wordings().values():
        assert len(set(wordings)) == len(wordings) >= 2


@pytest.mark.parametrize(
    ("task", "answers", "contains"),
    [
        ("caption", {"A red car."}, ""),
        ("vqa", {"red"}, "What colour?"),
        ("choice", {"B"}, "A. blue\nB. red"),
        ("ocr", {f"<ref>EXIT</ref>{BOXES[0]}<ref>7</ref>{BOXES[1]}"}, ""),
        ("grounded_ocr", set(TEXTS), BOXES),
        ("referring", set(BOXES), TEXTS),
        ("transcription", {"EXIT\n7"}, ""),
        ("math", {"2"}, "1 + 1?"),
    ],
)
def test_a_row_is_asked_in_all_wordings_of_its_task(folder, task, answers, contains):
    found = [asked(folder, task, name=f"r:{n}") for n in range(60)]
    assert {answer for _, answer in found} == answers
    for question, answer in found:
        if task == "grounded_ocr":
            assert BOXES[TEXTS.index(answer)] in question
        elif task == "referring":
            assert TEXTS[BOXES.index(answer)] in question
        else:
            assert contains in question
        assert "{" not in question
    shapes = {re.sub(r"<(box|quad)>.*</\1>|EXIT|7", "*", question) for question, _ in found}
    assert len(shapes) == len(tasks._wordings()[task])


def test_what_is_drawn_depends_on_seed_and_name_alone(folder):
    names = [f"r:{n}" for n in range(40)]
    first = [asked(folder, "caption", name) for name in names]
    assert first == [asked(folder, "caption", name) for name in names]
    assert first != [asked(folder, "caption", name, seed=1) for name in names]
    assert [drawn(7, "r.jsonl:3", "wording", n) for n in (2, 5, 1000)] == [1, 2, 507]
    counts = Counter(drawn(0, f"r:{n}", "wording", 4) for n in range(4000))
    assert all(850 < counts[n] < 1150 for n in range(4))
    together = Counter((drawn(0, f"r:{n}", "wording", 2), drawn(0, f"r:{n}", "region", 2)) for n in range(4000))
    assert all(850 < count < 1150 for count in together.values())


@pytest.mark.parametrize("answer", ["red", "B", 1])
def test_the_right_option_is_named_by_letter_text_or_place(folder, answer):
    assert asked(folder, "choice", answer=answer)[1] == "B"


def test_of_several_people_s_answers_the_most_frequent_is_taken(folder):
    assert asked(folder, "vqa", answer=["red", "dark red", "dark red"])[1] == "dark red"
    assert asked(folder, "vqa", answer=["red", "dark red"])[1] == "red"


def test_columns_are_text_without_marks_and_braces_mean_nothing(folder):
    question, answer = asked(folder, "vqa", question="What is <image> in {answer}?", answer="a \\<image> {0}")
    assert "What is <image> in {answer}?" in split_marks(question)[0]
    assert split_marks(answer) == ("a \\<image> {0}",)


@pytest.mark.parametrize(
    ("task", "keys", "reason"),
    [
        ("vqa", {"answer": ""}, "`answer` is empty"),
        ("vqa", {"answer": " \n"}, "`answer` is empty"),
        ("vqa", {"answer": []}, "`answer` is empty"),
        ("vqa", {"answer": ["red", None]}, "answer 2 of 2 is null, expected text"),
        ("vqa", {"question": None}, "`question` is null, expected text"),
        ("vqa", {"image": None}, "no image or video, which the task vqa needs"),
        ("vqa", {"image": [None]}, "image 1 of 1 in `image` is null"),
        ("caption", {"caption": ["A", "B"]}, "`caption` is a list, expected text"),
        ("caption", {"audio": "a.mp3"}, "key `audio` is not read"),
        ("choice", {"options": ["red"]}, "not a list of 2 to 26 options"),
        ("choice", {"options": ["red"] * 27}, "not a list of 2 to 26 options"),
        ("choice", {"options": ["red", ""]}, "option 2 of 2 is empty"),
        ("choice", {"answer": 2}, "`answer` 2 is none of the 2 options"),
        ("choice", {"answer": -1}, "is none of the 2 options"),
        ("choice", {"answer": True}, "`answer` is true or false"),
        ("choice", {"options": ["B", "A"], "answer": "A"}, "`answer` 'A' is several of the 2 options"),
        ("ocr", {"image": ["a.png", "a.png"]}, "2 images, expected 1: boxes belong to one image"),
        ("ocr", {"boxes": [[0, 0, 1, 1]]}, "not two lists of the same length"),
        ("ocr", {"text": [], "boxes": []}, "not two lists of the same length, at least 1"),
        ("ocr", {"text": ["a", ""], "boxes": [[0, 0, 1, 1]] * 2}, "text 2 of 2 is empty"),
        (
            "referring",
            {"boxes": [[0, 0, 9, 9], [0, 0, 201, 9]]},
            r"box 2 of 2, \(0,0\),\(201,9\), is not inside .* 200 x",
        ),
        ("grounded_ocr", {"boxes": [[0, 0, 9, 9], [5, 5, 5, 9]]}, "box 2 of 2, .* is empty: expected x1 < x2"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(folder, task, keys, reason):
    with pytest.raises(BadRecord, match=reason):
        asked(folder, task, **keys)


def test_one_text_and_one_box_are_enough(folder):
    for box in ([0, 0, 200, 100], [[0, 0], [200, 100]], [[0, 0, 200, 100]]):
        assert asked(folder, "ocr", text="EXIT", boxes=box)[1] == "<ref>EXIT</ref><box>(0,0),(999,999)</box>"


@pytest.mark.parametrize(
    ("box", "text"),
    [
        ([0, 0, 200, 100], "<box>(0,0),(999,999)</box>"),
        ([148.7, 62.2, 177.4, 67.3], "<box>(743,621),(886,672)</box>"),
        ([[0, 0], [100, 0], [100, 50], [0, 50]], "<quad>(0,0),(500,0),(500,500),(0,500)</quad>"),
        ((0, 50, 0, 0, 100, 0, 100, 50), "<quad>(0,500),(0,0),(500,0),(500,500)</quad>"),  # the other way around
    ],
)
def test_boxes_are_scaled_to_999_whatever_the_image(box, text):
    assert box_text(box, (200, 100), "box 1") == text


@pytest.mark.parametrize(
    "box",
    [None, "0,0,1,1", [], [1, 2, 3], [0, 0, 1, True], [0, 0, "1", 1], [0, 0, float("nan"), 1], [0, 0, 10**400, 1]]
    + [[-1, 0, 5, 5], [0, 0, 5, 100.5], [5, 5, 1, 1], [5, 0, 1, 9], [0, 0, 0, 0], [0, 0, 5, 5, 9, 9, 2, 2], {"x": 1}],
)
def test_boxes_that_are_none_or_empty_or_outside_are_refused(box):
    with pytest.raises(BadRecord, match="box 1"):
        box_text(box, (200, 100), "box 1")


@given(st.tuples(*[st.floats(0, 1)] * 4), st.tuples(st.integers(1, 9000), st.integers(1, 9000)))
def test_scaled_corners_stay_within_a_cell_of_the_true_ones(corners, size):
    x1, x2, y1, y2 = (*sorted(corners[:2]), *sorted(corners[2:]))
    box = [x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1]]
    try:
        text = box_text(box, size, "box")
    except BadRecord:
        return
    numbers = list(map(int, re.findall(r"\d+", text)))
    assert all(0 <= n <= 999 and abs(n - 999 * part) <= 0.5 + 1e-6 for n, part in zip(numbers, (x1, y1, x2, y2)))


def test_the_task_of_a_source_is_a_key(folder, configured):
    rows = [{"image": "a.png", **ROWS["vqa"]}, {"image": "a.png", "question": "?"}]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = configured("data=jsonl", f"data.path={folder / 'r.jsonl'}", "data.task=vqa").data
    asked_with = set()
    for seed in range(9):
        records = build_records(data, seed)
        assert records[0] == task_form("vqa", seed)(rows[0], "r.jsonl:1", folder)
        asked_with.add(records[0].messages[0]["content"])
    assert len(asked_with) == len(tasks._wordings()["vqa"])
    with pytest.raises(BadRecord, match="`answer` is null"):
        records[1]
    with pytest.raises(ConfigError, match="data.task"):
        configured("data=jsonl", f"data.path={folder / 'r.jsonl'}", "data.task=vqs")
