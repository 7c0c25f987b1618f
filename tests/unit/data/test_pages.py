"""The built-in pages, as pictures and written out as text."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from nvlm.data.sources.pages import MAX_QUESTIONS, make_page
from nvlm.data.sources.registry import build_records


def test_the_questions_of_pictures_are_those_of_earlier_versions():
    found = hashlib.sha256()
    for index in range(20):
        page = make_page("train", 1234, index, 4)
        found.update(json.dumps([page["id"], page["messages"], page["kinds"], page["images"][0].size]).encode())
    assert found.hexdigest() == "c4d8136436ec3dfdf7c7e8c7955d0e089398256875d798111ddaf1f430f9ac23"


@pytest.mark.parametrize("index", range(12))
def test_answers_about_a_text_follow_from_the_text(index):
    row = make_page("heldout", 7, index, MAX_QUESTIONS, "text")
    assert row["images"] == [] and "<" not in row["messages"][0]["content"]
    *lines, question = row["messages"][0]["content"].split("\n")
    rows = [re.fullmatch(rf"row {number}: (\d+)", line)[1] for number, line in enumerate(lines, start=1)]
    questions = [question, *(message["content"] for message in row["messages"][2::2])]
    assert len(set(questions)) == MAX_QUESTIONS
    for asked, answer in zip(questions, row["messages"][1::2], strict=True):
        number = re.search(r"\d", asked)
        expected = {
            "Read row": rows[int(number[0]) - 1] if asked.startswith("Read row") else "",
            "Read the": "".join(rows),
            "How many": str("".join(rows).count(number[0])) if number else "",
        }[asked[:8]]
        assert answer["content"] == expected


def test_texts_are_records_without_images_held_out_too(configured):
    config = configured("data.form=text", "data.records=6", "data.heldout_records=4")
    for heldout, count in ((False, 6), (True, 4)):
        records = build_records(config.data, config.seed, heldout=heldout)
        assert len(records) == count and not any(record.images for record in records)
    assert len(records[0].messages) == 2  # one question
