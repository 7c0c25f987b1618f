"""What a record may contain: keys that mean something to other trainers are supported or refused by name."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace

import pytest
from PIL import Image

from nvlm.arch import registry
from nvlm.data.batch import IGNORE, IMAGE
from nvlm.data.forms.auto import read
from nvlm.data.messages import (
    NoAnswer,
    check_learns,
    first_question,
    literal,
    place_images,
    read_turns,
    split_marks,
    with_marks,
)
from nvlm.data.outline import build_processor
from nvlm.data.parts import images_in_parts
from nvlm.data.record import BadRecord, Record, one_record, printable
from nvlm.data.samples import encode
from nvlm.data.sources.json_file import parsed
from nvlm.data.text.tokenizer import load_tokenizer
from nvlm.export import modeling_nvlm

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def processor(configured):
    return build_processor(configured("arch=decoder"), registry.placement_rule("decoder"))


def learned(record, processor):
    sample = encode(record, processor)
    ids = sample.labels[sample.labels != IGNORE].tolist()
    return load_tokenizer("tiny").tokenizer.decode(ids, skip_special_tokens=False)


def line(**keys):
    return json.dumps({"messages": TALK} | keys).encode()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"image_path": "a.png"}, "key `image_path` is not read: put the paths of images into `images`"),
        ({"audios": ["a.wav"]}, "key `audios` is not read"),
        ({"system": "Be kind."}, "key `system` is not read: put it into `messages`"),
        ({"tools": [{}]}, "key `tools` is not read"),
        ({"rejected": "no"}, "key `rejected` is not read"),
        ({"conversations": [{"from": "human", "value": "?"}]}, "both `messages` and `conversations`"),
    ],
)
def test_a_key_that_others_give_a_meaning_is_refused_by_name(tmp_path, keys, reason):
    with pytest.raises(BadRecord, match=reason):
        read(parsed(line(**keys)), "r:1", tmp_path)
    empty = {key: type(value)() for key, value in keys.items()}
    for nothing in (empty, dict.fromkeys(keys)):
        assert read(parsed(line(**nothing)), "r:1", tmp_path).messages == TALK


def test_keys_that_mean_nothing_to_anyone_are_the_users_own(tmp_path):
    record = read(parsed(line(source="web", score=0.5, meta={"page": 3}, id=7)), "r:1", tmp_path)
    assert record == Record("7", TALK, [])
    assert read(parsed(line(id=None)), "r:1", tmp_path).id == "r:1"


def test_turns_and_images_are_read_as_users_write_them(tmp_path):
    """The key that holds the turns and the keys of a turn are independent of each other."""
    llava = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    ours = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]
    for key in ("messages", "conversations"):
        for turns in (llava, ours):
            for images in ({"image": "a.png"}, {"images": "a.png"}, {"images": ["a.png"]}, {"image": ["a.png"]}):
                record = read({key: turns, **images}, "r:1", tmp_path)
                assert (record.messages, record.images) == (ours, [tmp_path / "a.png"])
    filled = [turn | {"role": None, "content": None} for turn in llava]  # a table has all columns in every row
    assert read({"conversations": filled, "messages": None}, "r:1", tmp_path).messages == ours
    system = read({"messages": [{"from": "system", "value": "Be brief."}, *llava]}, "r:1", tmp_path)
    assert system.messages == [{"role": "system", "content": "Be brief."}, *ours]
    with pytest.raises(BadRecord, match="key 'from' of a message of role user"):
        read_turns(read({"messages": [llava[0] | ours[0], ours[1]]}, "r:1", tmp_path).messages)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hello", "a message is text, expected an object"),
        ({"role": "user"}, "content of a message of role user is null, expected text"),
        ({"role": "user", "content": {"text": "hi"}}, "is an object, expected text"),
        ({"role": ["user"], "content": "hi"}, r"role \['user'\], expected one of"),
        ({"role": "tool", "content": "4"}, "role 'tool', expected one of"),
        ({"role": "user", "content": "hi", "name": "Ann"}, "key 'name' of a message of role user is not supported"),
        ({"role": "user", "content": "hi", "images": ["a.png"]}, "key 'images' of a message"),
        ({"role": "user", "content": ["hello"]}, "a part of a content list is text, expected an object"),
        ({"role": "user", "content": [{"type": "video"}]}, "a part of type 'video'"),
        ({"role": "user", "content": [{"text": "hi"}]}, "a part of type None"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "the text of a part is null"),
        ({"role": "user", "content": [{"type": "text", "content": "hi"}]}, "key 'content' of a part of type text"),
        ({"role": "user", "content": [{"type": "image", "file": "a.png"}]}, "key 'file' of a part of type image"),
        (
            {"role": "user", "content": [{"type": "image", "path": 3}]},
            "the image of a part is a number, expected a path",
        ),
        ({"role": "document", "content": "hi", "name": "Ann"}, "key 'name' of a message of role document"),
        ({"role": "user", "content": "ok \ud800 bad"}, r"U\+D800 in a message, half of a surrogate pair"),
        ({"role": "user", "content": [{"type": "text", "text": "\udfff"}]}, r"U\+DFFF"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "weight 0.5 of a message of role assistant, expected"),
        ({"role": "assistant", "content": "a", "loss": "no"}, "loss 'no'"),
        ({"role": "assistant", "content": "a", "loss": True, "weight": 0}, "loss and weight .* contradict"),
        ({"role": "user", "content": "hi", "loss": True}, "only the assistant's can have loss"),
        ({"role": "assistant", "content": "a", "train": False}, "key 'train' of a message"),
    ],
)
def test_a_message_that_is_not_understood_is_refused_by_name(message, reason):
    with pytest.raises(BadRecord, match=reason):
        read_turns([message])


def test_columns_of_a_table_that_say_nothing_are_no_keys():
    """As Parquet and JSON writers leave them in rows that do not use them."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "hi", "image_url": None}]
    (turn,) = read_turns([{"role": "user", "content": parts, "tool_calls": [], "name": None, "loss": None}])
    assert turn.texts == ("", "hi") and not turn.learned


@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}, {"weight": 0.0}, {"loss": False, "weight": 0}])
def test_a_turn_with_loss_false_is_read_but_not_learned(processor, mark):
    messages = [*TALK, {"role": "user", "content": "again"}, {"role": "assistant", "content": "learn this"}]
    marked = [messages[0], messages[1] | mark, *messages[2:]]
    assert learned(Record("r", messages, []), processor) == "yes<|im_end|>learn this<|im_end|>"
    assert learned(Record("r", marked, []), processor) == "learn this<|im_end|>"
    one, other = (encode(Record("r", talk, []), processor) for talk in (messages, marked))
    assert one.tokens.equal(other.tokens)
    with pytest.raises(BadRecord, match="no assistant turn to learn from: all have loss false or weight 0"):
        encode(Record("r", marked[:2], []), processor)


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_answer_alone_is_nothing_to_learn(processor, empty):
    silent = [TALK[0], {"role": "assistant", "content": empty}]
    with pytest.raises(BadRecord, match="no text to learn"):
        encode(Record("r", silent, []), processor)
    assert learned(Record("r", [*silent, *TALK], []), processor).endswith("yes<|im_end|>")


@pytest.mark.parametrize(("marks", "images"), [(1, 2), (2, 1), (1, 0), (3, 2)])
def test_marks_that_do_not_add_up_are_refused_with_both_counts(marks, images):
    turns = read_turns([{"role": "user", "content": "Compare" + " <image>" * marks}, TALK[1]])
    with pytest.raises(BadRecord, match=f"{marks} <image> marks, but {images} images"):
        place_images(turns, images)


def test_without_marks_images_stand_in_front_of_the_first_user_turn():
    turns = read_turns([{"role": "system", "content": "S"}, *TALK])
    assert [turn.texts for turn in place_images(turns, 2)] == [("S",), ("", "\n", "\nhi"), ("yes",)]
    assert place_images(turns, 0) == turns


def test_a_held_out_answer_is_the_first_that_is_learned():
    parts = [{"type": "text", "text": "re"}, {"type": "text", "text": "d"}]
    asked, answer = first_question(Record("r", [TALK[0], {"role": "assistant", "content": parts}], []))
    assert answer == "red" and asked.messages == [TALK[0]]
    skipped = [TALK[0], TALK[1] | {"loss": False}, {"role": "user", "content": "more"}, TALK[1] | {"content": "no"}]
    asked, answer = first_question(Record("r", skipped, []))
    assert answer == "no" and [message["content"] for message in asked.messages] == ["hi", "yes", "more"]
    for messages in (TALK[:1], [TALK[0], {"role": "assistant", "content": " "}]):
        with pytest.raises(NoAnswer):
            first_question(Record("r", messages, []))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to decode image"), "RuntimeError: Failed to decode image"),
        (KeyError("x"), "KeyError: 'x'"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (BadRecord("line 1\nline 2 \ud800"), r"line 1 line 2 \ud800"),
    ],
)
def test_whatever_one_record_raises_is_a_bad_record_with_one_line(error, reason):
    with pytest.raises(BadRecord) as caught, one_record():
        raise error
    assert str(caught.value) == reason
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit, AssertionError])
def test_what_no_record_is_to_blame_for_passes(error):
    with pytest.raises(error), one_record():
        raise error


def test_reasons_are_one_line_of_limited_length():
    assert printable("a\tb\n\x1b[31mc") == r"a b \x1b[31mc"
    assert len(printable("x" * 1000)) == 300


def random_texts(rng, count):
    pieces = ("\\", "\\\\", "<image>", "<image", ">", "<", "a", "\n", "<Image>", "\u6f22")
    return tuple("".join(rng.choices(pieces, k=rng.randrange(7))) for _ in range(count))


def test_any_texts_come_back_through_escapes_and_marks():
    """Random texts of backslashes and marks, n + 1 of them around n images."""
    rng = random.Random(0)
    for _ in range(5000):
        texts = random_texts(rng, rng.randrange(1, 5))
        assert split_marks(with_marks(texts)) == texts
        assert split_marks(literal(texts[0])) == texts[:1]
        assert tuple(modeling_nvlm.split_marks(with_marks(texts))) == texts  # an export reads the same marks
        parts = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": literal(text)})]
        (turn,) = read_turns([{"role": "user", "content": parts[1:]}])
        assert turn.texts == texts


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (r"<image>a", ("", "a")),
        (r"\<image>a", ("<image>a",)),
        (r"\\<image>a", ("\\", "a")),
        (r"\\\<image>a", (r"\<image>a",)),
        (r"\\\\<image>a", (r"\\", "a")),
        (r"C:\new\\<x>\<image", (r"C:\new\\<x>\<image",)),  # backslashes elsewhere are text
    ],
)
def test_a_backslash_escapes_a_mark(content, texts):
    assert split_marks(content) == texts


def test_an_escaped_mark_needs_no_image_and_is_tokenised_as_text(processor):
    sample = encode(Record("r", [{"role": "user", "content": r"What is \<image>?"}, TALK[1]], []), processor)
    assert "user\nWhat is <image>?<|im_end|>" in load_tokenizer("tiny").tokenizer.decode(
        sample.tokens.tolist(), skip_special_tokens=False
    )


def test_long_runs_of_backslashes_take_linear_time():
    text = ("\\" * 500_000 + "x") * 2 + "<image>"
    began = time.perf_counter()
    assert split_marks(text) == (text.removesuffix("<image>"), "")
    assert time.perf_counter() - began < 2


def document(content, **keys):
    return [{"role": "document", "content": content, **keys}]


def test_a_document_is_text_to_learn_and_its_end(processor):
    """Without roles and without the run's system message."""
    processor = replace(processor, system="Be kind.")
    sample = encode(Record("r", document("Once. "), []), processor)
    text = load_tokenizer("tiny").tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False)
    assert text == "Once. <|endoftext|>"
    # The first token is predicted by none.
    assert sample.labels.tolist() == [*sample.tokens.tolist()[1:], IGNORE]


def test_an_image_of_a_document_is_never_learned(processor):
    picture = Image.new("RGB", (112, 112))
    sample = encode(Record("r", document("One <image>two <image>"), [picture, picture]), processor)
    assert learned(Record("r", document("One <image>two <image>"), [picture, picture]), processor).endswith(
        "two <|endoftext|>"
    )
    before = IMAGE == sample.tokens
    assert before.sum() == 2 * processor.tile_tokens
    assert not ((sample.labels != IGNORE) & before.roll(-1)).any()
    prompt = encode(Record("r", document("One <image>two <image>"), [picture, picture]), processor, generate=True)
    assert prompt.tokens.tolist() == sample.tokens.tolist()[:-1]


@pytest.mark.parametrize(
    ("messages", "images", "reason"),
    [
        ([*document("a"), *TALK], 0, "a message of role document among 3 messages"),
        (document("a"), 1, "0 <image> marks, but 1 images: expected a mark for each image$"),
        (document("<image>a"), 0, "1 <image> marks, but 0 images"),
        (document(" \n"), 0, "no text to learn: the document has none"),
        (document("<image> <image>\n"), 2, "no text to learn: the document has none"),
        (document("a", loss=False), 0, "a document that has loss false or weight 0"),
    ],
)
def test_a_document_that_cannot_be_used_is_refused(messages, images, reason):
    with pytest.raises(BadRecord, match=reason):
        check_learns(place_images(read_turns(messages), images))


def test_a_document_asks_no_question():
    with pytest.raises(NoAnswer):
        first_question(Record("r", document("a"), []))


def spoken(*parts):
    return [{"role": "user", "content": [{"type": "text", "text": "hi"}, *parts]}, TALK[1]]


PNG = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    ("parts", "images"),
    [
        ([{"type": "image"}], []),
        ([{"type": "image", "image": "a.png"}, {"type": "image", "path": "b.png", "image": None}], ["a.png", "b.png"]),
        ([{"type": "image_url", "image_url": "a.png"}], ["a.png"]),
        ([{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}], ["a.png"]),
        ([{"type": "image", "image": {"bytes": b"JPEG", "path": "a.png"}}], [b"JPEG"]),
        ([{"type": "image", "image": PNG}], [b"\x89PNG\r\n\x1a\n"]),
    ],
)
def test_a_part_may_name_its_image(parts, images):
    messages = spoken(*parts)
    assert images_in_parts(messages) == images
    assert sum(turn.images for turn in read_turns(messages)) == len(parts)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([{"type": "image"}, {"type": "image", "image": "a.png"}], "2 parts of type image, 1 with a path"),
        ([{"type": "image", "image": "https://a.b/c.png"}], "image https://a.b/c.png is a URL, expected a path"),
        ([{"type": "image_url", "image_url": {"url": "s3://a/b.png"}}], "is a URL"),
        ([{"type": "image", "image": "a.png", "path": "b.png"}], "several paths"),
        ([{"type": "image", "image": "data:image/png,xyz"}], "expected data:TYPE;base64"),
        ([{"type": "image", "image": "data:image/png;base64,a\u00e9"}], "base64 text is damaged"),
        ([{"type": "image", "image": ["a.png"]}], "the image of a part is a list"),
        ([{"type": "image_url", "image_url": {"uri": "a.png"}}], "key 'uri' of a struct of an image"),
    ],
)
def test_a_part_whose_image_is_not_understood_is_refused(parts, reason):
    with pytest.raises(BadRecord, match=reason):
        images_in_parts(spoken(*parts))


def test_a_line_has_its_images_in_parts_or_in_a_list(tmp_path):
    part = {"type": "image", "image": "a.png"}
    record = read(parsed(line(messages=spoken(part))), "r:1", tmp_path)
    assert record.images == [tmp_path / "a.png"]
    with pytest.raises(BadRecord, match="images in several places, 1 in parts of messages and 1 in `images`"):
        read(parsed(line(messages=spoken(part), images=["a.png"])), "r:1", tmp_path)
    assert read(parsed(line(messages=spoken({"type": "image"}), images=["b.png"])), "r:1", tmp_path).images == [
        tmp_path / "b.png"
    ]


def test_a_value_that_is_nested_too_deeply_for_a_message_is_named_all_the_same():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for turn in ({"role": deep, "content": "hi"}, {"role": "user", "content": [{"type": deep}]}):
        with pytest.raises(BadRecord, match=r"\[\[\[\[\[\[\.\.\.\]+, expected"):
            read_turns([turn])
