"""The built-in task of learning in context: a word is known only from an earlier picture of the same colour."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.data.messages import first_question
from nvlm.data.outline import build_processor
from nvlm.data.samples import encode
from nvlm.data.sources.colours import LETTERS, WORDS, make
from nvlm.data.sources.registry import build_records


def colour(data: bytes) -> tuple[float, ...]:
    """The mean of a picture, coarse enough that grain and brightness do not matter."""
    mean = np.asarray(Image.open(io.BytesIO(data)), dtype=float).mean((0, 1))
    return tuple(np.round(mean / mean.max(), 1))


@pytest.mark.parametrize("form", ["picture", "text"])
def test_a_question_can_be_answered_from_its_shots_alone(form):
    for index in range(50):
        record = make("heldout", 3, index, pictures=6, colours=2, shots=4, form=form)
        asked, answer = first_question(record)
        assert asked is record and answer in WORDS
        (message,) = record.messages
        if form == "text":
            shown = [c for c in message["content"] if c in LETTERS]
            said = [c for c in message["content"] if c in WORDS]
        else:
            shown = [colour(image) for image in record.images]
            said = message["content"].split("<image>")[1:-1]
        assert len(shown) == 5 and len(said) == 4
        known = {}
        for picture, word in zip(shown, said):
            assert known.setdefault(picture, word) == word
        if form == "text":
            assert known[shown[-1]] == answer
        else:
            near = min(known, key=lambda other: sum(abs(a - b) for a, b in zip(other, shown[-1])))
            assert known[near] == answer
        assert len(set(said)) == 2  # so that one answer in two is right by chance


def test_without_shots_nothing_tells_the_word():
    answers = [first_question(make("heldout", 0, index, 6, 2, shots=0))[1] for index in range(400)]
    assert set(answers) == set(WORDS) and max(map(answers.count, WORDS)) < 90


def test_records_are_the_same_each_time_and_differ(configured):
    config = configured("arch=decoder", "data=colours", "tiling=single")
    records, again = (build_records(config.data, 7) for _ in range(2))
    assert len(records) == 100_000 and records[5] == again[5] != records[6]
    held = build_records(config.data, 7, heldout=True)
    assert held.kind(0) == "4-shot" and held[0].answers and held.name(1) == held[1].id
    sample = encode(records[0], build_processor(config, placement_rule("decoder")))
    assert len(sample.pixels) == 6 and int((sample.labels != -100).sum()) == 7  # six words, and the end of the text
