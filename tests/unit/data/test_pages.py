"""The built-in pages, as pictures and written out as text."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest

from nvlm.config.values import ConfigError
from nvlm.data.sources.page_questions import MOST
from nvlm.data.sources.pages import make_page
from nvlm.data.sources.registry import build_records
from nvlm.tiling.grid import TilePlan
from nvlm.tiling.tags import TAG_STYLES, tile_tags


def test_the_questions_of_pictures_are_those_of_earlier_versions():
    found = hashlib.sha256()
    for index in range(20):
        page = make_page("train", 1234, index, 4)
        found.update(json.dumps([page["id"], page["messages"], page["kinds"], page["images"][0].size]).encode())
    assert found.hexdigest() == "c4d8136436ec3dfdf7c7e8c7955d0e089398256875d798111ddaf1f430f9ac23"


def turns(row):
    """The lines written before the first question, and each question with its answer."""
    *lines, question = row["messages"][0]["content"].split("\n")
    questions = [question, *(message["content"] for message in row["messages"][2::2])]
    return lines, dict(zip(questions, (message["content"] for message in row["messages"][1::2]), strict=True))


@pytest.mark.parametrize("index", range(12))
def test_answers_about_a_text_follow_from_the_text(index):
    row = make_page("heldout", 7, index, MOST["tags"], "text")
    assert row["images"] == [] and "<" not in row["messages"][0]["content"]
    lines, answers = turns(row)
    rows = [re.fullmatch(rf"row {number}: (\d+)", line)[1] for number, line in enumerate(lines, start=1)]
    assert len(answers) == MOST["tags"]
    for asked, answer in answers.items():
        number = re.search(r"\d", asked)
        expected = {
            "Read row": rows[int(number[0]) - 1] if asked.startswith("Read row") else "",
            "Read the": "".join(rows),
            "How many": str("".join(rows).count(number[0])) if number else "",
        }[asked[:8]]
        assert answer == expected


@pytest.mark.parametrize("index", range(12))
def test_answers_about_positions_follow_from_the_text(index):
    row = make_page("heldout", 7, index, MOST["positions"], "text", "positions")
    lines, answers = turns(row)
    rows = {re.fullmatch(r"row ([A-F]): \d+", line)[1]: line[7:] for line in lines}
    page = "".join(rows.values())
    assert list(rows) == list("ABCDEF")[: len(rows)] and len(set(page)) == len(page)
    expected = {"Read the page.": page, "Sort the page.": "".join(sorted(page))}
    expected |= {f"Read row {name}.": digits for name, digits in rows.items()}
    expected |= {f"Read place {name}.": digit for name, digit in zip("ABCDEF", page)}
    cells = {(row, "ABCDEF"[at]): digit for row, digits in rows.items() for at, digit in enumerate(digits)}
    expected |= {f"Read row {row}, column {column}.": digit for (row, column), digit in cells.items()}
    assert len(answers) == MOST["positions"] and answers.items() <= expected.items()


def test_questions_about_positions_share_no_sign_of_position_with_any_tag():
    named = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])|\d")
    tags = "".join(tag for style in TAG_STYLES for tag in tile_tags(TilePlan(cols=3, rows=2), style))
    questions = [
        question for index in range(40) for question in turns(make_page("train", 3, index, 5, "text", "positions"))[1]
    ]
    letters = {found for question in questions for found in named.findall(question)}
    assert letters == set("ABCDEF") and not letters & set(named.findall(tags))


def test_who_does_not_see_the_page_answers_one_question_in_ten():
    """The likeliest answer to each question and kind of page, found on one half of the pages, asked on the other."""
    asked = {"train": Counter(), "heldout": Counter()}
    for split, found in asked.items():
        for index in range(1500):
            lines, answers = turns(make_page(split, 5, index, 4, "text", "positions"))
            shape = tuple(map(len, lines))  # all that is known of a page: even its grid
            found.update((shape, question, answer) for question, answer in answers.items())
    best: dict[tuple, tuple[int, str]] = {}
    for (shape, question, answer), count in asked["train"].items():
        best[shape, question] = max(best.get((shape, question), (0, "")), (count, answer))
    right = sum(asked["heldout"][shape, question, answer] for (shape, question), (_, answer) in best.items())
    assert 0.03 < right / asked["heldout"].total() < 0.1


def test_a_page_about_positions_is_the_same_task_on_other_pages():
    pages = [make_page("train", 3, index, 4, about="positions") for index in range(12)]
    assert all(len(page["images"]) == 1 and page["id"].endswith("-positions") for page in pages)
    assert {kind for page in pages for kind in page["kinds"]} == {"cell", "place", "row", "page", "sort"}
    other = make_page("train", 3, 0, 4)["images"][0]
    assert pages[0]["images"][0].size != other.size or np.any(np.asarray(pages[0]["images"][0]) != np.asarray(other))


@pytest.mark.parametrize(
    "words, key",
    [
        (("data.about=positions", "data.questions=6"), "data.questions"),
        (
            ("data=tiny_blend", "data.sources.text.about=positions", "data.sources.text.questions=6"),
            "data.sources.text.questions",
        ),
    ],
)
def test_more_questions_than_a_page_of_one_tile_allows_are_refused(configured, words, key):
    with pytest.raises(ConfigError, match=f"{key}.*got 6.*{key}=5"):
        configured(*words)


def test_texts_are_records_without_images_held_out_too(configured):
    config = configured("data.form=text", "data.records=6", "data.heldout_records=4")
    for heldout, count in ((False, 6), (True, 4)):
        records = build_records(config.data, config.seed, heldout=heldout)
        assert len(records) == count and not any(record.images for record in records)
    assert len(records[0].messages) == 2  # one question


def test_a_line_of_digits_on_several_pictures_with_questions_or_in_a_document():
    counts = set()
    for index in range(12):
        asked, document = (make_page("train", 7, index, 3, form, "positions") for form in ("pictures", "document"))
        (text,) = document["messages"]
        shown = re.findall(r"<image>\n(\d)\n", text["content"])
        assert text["role"] == "document" and "".join(f"<image>\n{digit}\n" for digit in shown) == text["content"]
        assert asked["messages"][0]["content"].count("<image>") == len(asked["images"]) == len(shown)
        assert [image.tobytes() for image in asked["images"]] == [image.tobytes() for image in document["images"]]
        for question, answer in zip(asked["messages"][::2], asked["messages"][1::2], strict=True):
            if place := re.search(r"place ([A-F])", question["content"]):
                assert answer["content"] == shown["ABCDEF".index(place[1])]
        counts.add(len(shown))
    assert counts <= set(range(2, 7)) and len(counts) > 2
