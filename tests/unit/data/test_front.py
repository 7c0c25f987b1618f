"""All images in front of a record, for a share of the records that any machine draws alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from nvlm.arch import registry
from nvlm.data.draw import happens
from nvlm.data.front import images_in_front
from nvlm.data.messages import check_learns, read_turns
from nvlm.data.outline import build_processor
from nvlm.data.record import Record
from nvlm.data.samples import encode
from nvlm.data.text.tokenizer import load_tokenizer


def of(*talk):
    return read_turns([{"role": role, "content": content} for role, content in talk])


@pytest.mark.parametrize(
    ("talk", "texts"),
    [
        (
            [("system", "S"), ("user", "Is <image>\nlike <image>?"), ("assistant", "No,<image>is.")],
            [("S",), ("", "\n", "\n", "\nIs image 1\nlike image 2?"), ("No, image 3 is.",)],
        ),
        (
            [("user", "Hi"), ("assistant", "Yes"), ("user", "<image><image>\nBoth?")],
            [("", "\n", "\nHi"), ("Yes",), ("image 1 image 2\nBoth?",)],
        ),
        ([("document", "a<image>b <image>.")], [("", "\n", "\na image 1 b image 2.")]),
        ([("user", "Only <image>"), ("assistant", "one")], None),
        ([("user", "<image>\n <image>\nBoth"), ("assistant", "in front")], None),
        ([("user", "none"), ("assistant", "at all")], None),
        ([("document", "<image><image>a")], None),
    ],
)
def test_words_stand_in_for_images_that_move_to_the_front(talk, texts):
    turns = of(*talk)
    moved = images_in_front(turns)
    assert [turn.texts for turn in moved] == (texts or [turn.texts for turn in turns])
    assert [(turn.role, turn.learned) for turn in moved] == [(turn.role, turn.learned) for turn in turns]
    assert sum(turn.images for turn in moved) == sum(turn.images for turn in turns)
    check_learns(moved)


def test_the_draw_is_the_same_on_any_machine():
    names = [f"records.jsonl:{number}" for number in range(4000)]
    chosen = [happens(1234, name, "images first", 0.25) for name in names]
    assert [number for number in range(40) if chosen[number]] == [6, 7, 9, 12, 13, 14, 21, 24, 29, 34, 35, 37]
    assert 900 < sum(chosen) < 1100
    assert all(happens(1234, name, "images first", 0.5) for name, yes in zip(names, chosen) if yes)
    assert sum(happens(1235, name, "images first", 0.25) != yes for name, yes in zip(names, chosen)) > 1000
    assert not any(happens(0, name, "x", 0.0) for name in names) and all(happens(0, name, "x", 1.0) for name in names)


def test_a_share_of_the_records_is_moved_in_training_alone(configured):
    usual = build_processor(configured("arch=decoder"), registry.placement_rule("decoder"))
    config = configured("arch=decoder", "data.images_first=0.5")
    mixed = build_processor(config, registry.placement_rule("decoder"))
    picture = Image.new("RGB", (100, 100))
    messages = [{"role": "user", "content": "a <image> b <image>"}, {"role": "assistant", "content": "c"}]
    shown = set()
    for number in range(12):
        record = Record(f"r:{number}", messages, [picture] * 2)
        ids = [i for i in encode(record, mixed).tokens.tolist() if i >= 0]
        shown.add("image 1" in load_tokenizer("tiny").decode(ids))
        asked = replace(record, messages=messages[:1])
        assert encode(asked, mixed, generate=True).tokens.equal(encode(asked, usual, generate=True).tokens)
        always = encode(record, replace(mixed, images_first=1.0))
        assert "a image 1 b image 2" in load_tokenizer("tiny").decode(i for i in always.tokens.tolist() if i >= 0)
        assert always.pixels.equal(encode(record, usual).pixels)
    assert shown == {True, False}
