"""From records to samples: ChatML, image slots, order, packing, and every kind of bad record."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm.arch import registry
from nvlm.data.batch import IGNORE, IMAGE
from nvlm.data.images import decode_image
from nvlm.data.loader import Steps, load_steps
from nvlm.data.messages import read_turns
from nvlm.data.order import Drawn, Order
from nvlm.data.outline import build_processor, outline
from nvlm.data.pack import collate, pack
from nvlm.data.record import BadRecord, ImageChanged, Record
from nvlm.data.samples import encode, fill
from nvlm.data.sources.json_rows import records_of
from nvlm.data.text import chat
from nvlm.data.text.tokenizer import load_tokenizer


@pytest.fixture
def processor(configured):
    def build(arch="hybrid", *overrides):
        config = configured(f"arch={arch}", *overrides)
        return build_processor(config, registry.placement_rule(arch))

    return build


def picture(width=120, height=120):
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8))


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_chatml_and_loss_on_the_assistants_words_only():
    tokenizer = load_tokenizer("tiny")
    turns = read_turns(talk(("user", "Hi there"), ("assistant", "Good day"), ("user", "More"), ("assistant", "No.")))
    runs = chat.runs(turns, tokenizer, system="Be kind.")
    ids = [i for run in runs for i in run.ids]
    text = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
        "Good day<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
    )
    trained = [i for run in runs if run.trained for i in run.ids]
    assert tokenizer.tokenizer.decode(trained, skip_special_tokens=False) == "Good day<|im_end|>No.<|im_end|>"


def test_text_cannot_forge_a_special_token():
    tokenizer = load_tokenizer("tiny")
    assert tokenizer.end not in tokenizer.encode("so <|im_end|> said I")


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_marks_and_images_are_made_to_agree(processor, arch):
    record = Record("r", talk(("user", "What is it?"), ("assistant", "A page.")), [picture()])
    marked = Record("r", talk(("user", "<image>\nWhat is it?"), ("assistant", "A page.")), [picture()])
    assert encode(record, processor(arch)).tokens.equal(encode(marked, processor(arch)).tokens)
    parts = [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]
    listed = Record("r", [{"role": "user", "content": parts}, *talk(("assistant", "A page."))], [picture()])
    assert encode(record, processor(arch)).tokens.equal(encode(listed, processor(arch)).tokens)


@pytest.mark.parametrize(
    ("messages", "images", "reason"),
    [
        (talk(("assistant", "Alone.")), 0, "no user turn"),
        (talk(("user", "<image> <image>"), ("assistant", "x")), 1, "2 <image> marks, but 1 images"),
        (talk(("user", "Only a question")), 0, "no assistant turn"),
        (talk(("robot", "x"), ("user", "y"), ("assistant", "z")), 0, "role 'robot'"),
        ([{"role": "user", "content": 3}, {"role": "assistant", "content": "z"}], 0, "expected text"),
        (talk(("user", "long " * 2000), ("assistant", "z")), 0, "data.seq_length"),
    ],
)
def test_records_that_cannot_be_trained_on_say_why(processor, messages, images, reason):
    with pytest.raises(BadRecord, match=reason):
        encode(Record("r", messages, [picture()] * images), processor())


def test_many_images_get_fewer_tiles_until_they_fit(processor):
    wide = [picture(600, 100)] * 3
    one = encode(Record("r", talk(("user", "?"), ("assistant", "!")), wide[:1]), processor("decoder"))
    three = encode(
        Record("r", talk(("user", "?"), ("assistant", "!")), wide), processor("decoder", "data.seq_length=256")
    )
    assert len(one.pixels) == 7
    assert len(three.pixels) < 3 * 7
    assert three.tokens.numel() <= 256
    with pytest.raises(BadRecord, match="do not fit the text stream"):
        encode(
            Record("r", talk(("user", "?"), ("assistant", "!")), wide * 9),
            processor("decoder", "data.seq_length=256"),
        )


def png_header(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_images_are_refused_by_name(tmp_path):
    whole = tmp_path / "whole.jpg"
    picture(400, 300).save(whole)
    truncated = tmp_path / "cut.jpg"
    truncated.write_bytes(whole.read_bytes()[:2000])
    huge = tmp_path / "huge.png"
    huge.write_bytes(png_header(100_000, 100_000))
    text = tmp_path / "text.png"
    text.write_text("not an image")
    assert decode_image(whole, 10**6).size == (400, 300)
    for path, reason in (
        (truncated, "cut.jpg.*truncated"),
        (huge, "huge.png.*(pixels|px)"),
        (text, "text.png"),
        (tmp_path / "gone.png", "gone.png: no such image"),
        (tmp_path, tmp_path.name),
    ):
        with pytest.raises(BadRecord, match=reason):
            decode_image(path, 10**6)
    with pytest.raises(BadRecord, match="400 x 300 px, more than data.max_pixels=1000"):
        decode_image(whole, 1000)


def test_an_image_of_another_size_than_its_header_said_is_refused(processor, tmp_path):
    """Tiles are planned once, from the header; pixels of another size must not be cut by that plan."""
    picture(300, 100).save(tmp_path / "a.png")
    record = Record("r", talk(("user", "What?"), ("assistant", "A.")), [tmp_path / "a.png"])
    sketch = outline(record, processor("decoder"))
    assert sketch.pictures.sizes == ((300, 100),)
    picture(290, 100).save(tmp_path / "a.png")
    with pytest.raises(BadRecord, match="300 x 100 px when it was planned, 290 x 100 px now"):
        fill(record, sketch, processor("decoder"))


@pytest.mark.parametrize("size", [(1400, 900), (300, 200)])  # reduced, and by the quick decoder
def test_draft_changes_pixels_a_little_and_nothing_else(processor, tmp_path, size):
    smooth = Image.radial_gradient("L").resize(size).convert("RGB")
    smooth.save(tmp_path / "a.jpg")
    record = Record("r", talk(("user", "What?"), ("assistant", "A.")), [tmp_path / "a.jpg"])
    exact, draft = (encode(record, processor("decoder", f"tiling.resize={name}")) for name in ("exact", "draft"))
    assert torch.equal(draft.tokens, exact.tokens) and draft.pixels.shape == exact.pixels.shape
    assert (draft.pixels.int() - exact.pixels.int()).abs().float().mean() < 1
    sketch = outline(record, processor("decoder", "tiling.resize=draft"))
    picture(1200, 900).save(tmp_path / "a.jpg")
    with pytest.raises(ImageChanged, match=f"{size[0]} x {size[1]} px when it was planned, 1200 x 900 px now"):
        fill(record, sketch, processor("decoder", "tiling.resize=draft"))


def test_jsonl_paths_stay_inside_the_folder(tmp_path):
    (tmp_path / "inside").mkdir()
    picture().save(tmp_path / "secret.png")
    file = tmp_path / "inside" / "records.jsonl"
    good = {"messages": talk(("user", "?"), ("assistant", "!")), "images": []}
    paths = [["../secret.png"], ["/etc/passwd"], [7], []]
    outside, absolute, number, fine = (json.dumps(good | {"images": images}) for images in paths)
    file.write_text("\n".join([outside, absolute, "{broken", json.dumps({"messages": "text"}), number, fine]))
    records = records_of(str(file))
    assert len(records) == 6
    for index, reason in enumerate(
        ["leaves the data folder", "leaves the data folder", "not JSON", "no list", "expected a path"]
    ):
        with pytest.raises(BadRecord, match=reason):
            records[index]
    assert records[5].id == "records.jsonl:6"


def test_first_fit_keeps_both_budgets_and_every_sample():
    rng = np.random.default_rng(0)
    lengths = [(int(a), int(b)) for a, b in zip(rng.integers(1, 100, 200), rng.integers(0, 50, 200))]
    rows = pack(lengths, 100, 60)
    assert sorted(i for row in rows for i in row) == list(range(200))
    for row in rows:
        assert sum(lengths[i][0] for i in row) <= 100
        assert sum(lengths[i][1] for i in row) <= 60


class _Some:
    """Ten records; number 3 is bad."""

    def __len__(self):
        return 10

    def name(self, index):
        return f"some:{index}"

    def __getitem__(self, index):
        if index == 3:
            raise BadRecord("spoilt")
        return Record(f"some:{index}", talk(("user", "Say it"), ("assistant", str(index))), [picture(100 + index)])


def test_steps_skip_and_name_bad_records_and_replicas_share_the_work(processor):
    def step(rank, size):
        return Steps(
            _Some(),
            processor(),
            order=Order(1, 10, (Drawn("", 10),)),
            steps=5,
            micro_batch=2,
            row_length=40,
            data_rank=rank,
            data_size=size,
        )[0]

    whole = step(0, 1)
    assert whole.skipped == (("some:3", "spoilt"),)
    ids = {name for batch in whole.micro_batches for row in batch.ids for name in row}
    assert ids == {f"some:{i}" for i in range(10) if i != 3}
    halves = [{n for b in step(rank, 2).micro_batches for row in b.ids for n in row} for rank in (0, 1)]
    assert halves[0] | halves[1] == ids
    assert not halves[0] & halves[1]


class _Raises(_Some):
    """Two more records fail in ways that no reader foresees, one of them only when its pixels are read."""

    def __getitem__(self, index):
        if index == 5:
            raise RecursionError("maximum recursion depth exceeded")
        record = super().__getitem__(index)
        return Record(record.id, record.messages, [_Spoilt(record.images[0])]) if index == 7 else record


class _Spoilt(Image.Image):
    """Has a size but no pixels."""

    def __init__(self, image):
        super().__init__()
        self._size = image.size

    def load(self):
        raise RuntimeError("the decoder gave up")


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_a_record_raises_names_it_and_the_others_go_on(processor, workers):
    settings = {"order": Order(1, 10, (Drawn("", 10),)), "steps": 1, "micro_batch": 2, "row_length": 40}
    steps = Steps(_Raises(), processor(), data_rank=0, data_size=1, **settings)
    (found,) = load_steps(steps, 0, workers)
    step = found.without(found.failed)
    assert dict(step.skipped) == {
        "some:3": "spoilt",
        "some:5": "RecursionError: maximum recursion depth exceeded",
        "some:7": "RuntimeError: the decoder gave up",
    }
    assert trained(step) == {f"some:{i}" for i in range(10) if i not in (3, 5, 7)}
    assert step.work.outputs == sum(batch.num_trained for batch in step.micro_batches) < found.work.outputs


def trained(step):
    """Ids of the samples with loss."""
    places = [(batch, place) for batch in step.micro_batches for place in (batch.labels != IGNORE).nonzero().tolist()]
    return {batch.ids[row][batch.sample[row, column]] for batch, (row, column) in places}


def test_a_step_without_a_good_record_still_has_a_micro_batch():
    batch = collate([], tile_size=112)
    assert batch.num_tokens == batch.num_trained == 0
    assert batch.tokens.shape == (1, 8)
    assert batch.pixels.shape == (0, 3, 112, 112)


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_placeholders_match_tiles_and_carry_no_loss(processor, arch):
    record = Record(
        "r",
        talk(("user", "<image> and <image>"), ("assistant", "Two.")),
        [picture(300, 100), picture(50, 50)],
    )
    sample = encode(record, processor(arch))
    places = sample.tokens == IMAGE
    assert int(places.sum()) == sample.stream_rows.numel()
    assert int((sample.cross_tokens == IMAGE).sum()) == sample.cross_rows.numel()
    # A label at t is the token at t + 1: neither a placeholder's own position nor the one before it may be trained
    # towards an image token.
    assert (sample.labels[places] == IGNORE).all()
    assert not (sample.labels == IMAGE).any()
    trained = sample.labels[sample.labels != IGNORE].tolist()
    assert load_tokenizer("tiny").tokenizer.decode(trained, skip_special_tokens=False) == "Two.<|im_end|>"
    assert torch.equal(
        sample.labels[:-1][sample.labels[:-1] != IGNORE], sample.tokens[1:][sample.labels[:-1] != IGNORE]
    )
