"""Inspection: exact counts, boxes that spell the text, the rule of visibility, rows as the loader makes them."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.attention.visibility import sees
from nvlm.data.blend import build_order
from nvlm.data.loader import Steps
from nvlm.data.outline import build_processor, outline
from nvlm.data.record import Record
from nvlm.data.samples import fill
from nvlm.data.sources.registry import build_records
from nvlm.data.text.tokenizer import TINY
from nvlm.inspect.charts import histogram, quantile
from nvlm.inspect.count import learned
from nvlm.inspect.pictures import data_url
from nvlm.inspect.rows import packed
from nvlm.inspect.samples import all_turns
from nvlm.inspect.sight import sight
from nvlm.inspect.stream import LEARNED, TAG, TILE, boxes, key_boxes
from nvlm.inspect.survey import Survey, tallied
from tests.unit.inspect.records import PX, arguments, found

ARCHITECTURES = ("decoder", "xattn", "hybrid")


@pytest.fixture
def config(folder, configured):
    return lambda arch="decoder", *more: configured(*arguments(folder, arch, *more))


def sketched(config, record):
    processor = build_processor(config, placement_rule(config.arch.name))
    return processor, outline(record, processor)


def record(config, index):
    return build_records(config.data, config.seed)[index]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_counts_are_those_of_the_records(config, folder, arch):
    """Six records: three usable, with (6 + 1) + 1, 1 and 0 tiles; one without its image, two that are too long."""
    made = config(arch)
    (tally,) = found(made, folder).tallies.values()
    assert (tally.records, tally.bad, tally.usable, tally.too_long) == (6, 3, 3, 2)
    assert (tally.images, tally.tiles, tally.fewer_tiles, tally.tiles_lost, tally.without_images) == (3, 9, 0, 0, 1)
    assert tally.by_grid == {(3, 2): 1, (1, 1): 2}
    assert tally.by_tiles == {8: 1, 1: 1, 0: 1}
    assert tally.by_width == {3 * PX: 1, PX: 2} and tally.by_height == {2 * PX: 1, PX: 2}
    # 16 tokens a tile: all in the stream, none, or thumbnails alone.
    assert tally.stream == 16 * {"decoder": 9, "xattn": 0, "hybrid": 3}[arch]
    tags = 6 * 3 if arch == "hybrid" else 0  # of regular tiles, <tile_ N >
    assert tally.keys == 16 * {"decoder": 0, "xattn": 9, "hybrid": 6}[arch] + tags
    samples = [fill(record(made, i), outline(record(made, i), p), p) for p in [processor(made)] for i in range(3)]
    assert tally.by_length == Counter(len(sample.tokens) for sample in samples)
    assert tally.text + tally.stream == sum(len(sample.tokens) for sample in samples)
    assert tally.learned == sum(int((sample.labels >= 0).sum()) for sample in samples)
    assert tally.keys == sum(len(sample.cross_tokens) for sample in samples)
    assert [name for name, _ in tally.faults] == [f"records.jsonl:{line}" for line in (4, 5, 6)]
    assert tally.reasons.total() == 3 and tally.reasons["FILE: no such image"] == 1


def processor(config):
    return build_processor(config, placement_rule(config.arch.name))


def test_fewer_tiles_are_counted(config, folder):
    (tally,) = found(config("xattn", "data.cross_length=112"), folder).tallies.values()
    assert (tally.fewer_tiles, tally.tiles, tally.tiles_lost) == (1, 7, 2)  # 2 x 2 and a thumbnail in place of 3 x 2


def test_documents_that_are_cut_are_counted(configured, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": "once upon a time " * count}) + "\n" for count in (1, 300)))
    made = configured("arch=decoder", "data=text", f"data.path={file}", "data.workers=0", "evaluate=none")
    seen = found(made, tmp_path)
    (tally,) = seen.tallies.values()
    assert (tally.records, tally.bad, tally.cut, tally.images) == (2, 0, 1, 0)
    assert max(tally.by_length) == made.data.seq_length and {one.cut for one in seen.shown} == {False, True}


def test_damaged_pixels_are_found_on_request(folder, configured, tmp_path):
    line = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    file = folder / "broken.jsonl"
    file.write_text(json.dumps(line | {"images": ["broken.png"]}))
    made = configured(*arguments(folder), f"data.path={file}")
    assert found(made, tmp_path).tallies[""].bad == 0
    damaged = found(made, tmp_path, pixels=True)
    assert damaged.tallies[""].bad == 1 and damaged.refused == ("",) and not damaged.shown


def test_a_sample_is_what_the_run_draws_first(config):
    made = config("decoder", "data.take=first:4")
    records = build_records(made.data, made.seed)
    order = build_order(made.data.source, records, made.seed, 4)
    survey = Survey(records, processor(made), order, most=2)
    assert survey.indices(0, range(2)) == sorted(order.sources[0].index(torch.arange(2).numpy(), made.seed))
    whole = Survey(records, processor(made), order)
    assert whole.indices(0, range(4)) == [0, 1, 2, 3]
    last = Survey(
        records, processor(made), build_order(config("decoder", "data.take=last:2").data.source, records, 1, 4)
    )
    assert last.indices(0, range(2)) == [4, 5]


def test_processes_count_the_same(config):
    made = config("hybrid")
    records = build_records(made.data, made.seed)
    survey = Survey(records, processor(made), build_order(made.data.source, records, made.seed, 4))
    done = []
    assert tallied(survey, 1, lambda *one: done.append(one)) == tallied(survey, 0, lambda *_: None)
    assert sum(count for _, count in done) == 6


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_boxes_are_the_stream_and_spell_the_text(config, arch):
    """Every token is in one box, at its position; boxes joined are the messages in the chat format."""
    made = config(arch)
    for index in range(3):
        one = record(made, index)
        processor, sketch = sketched(made, one)
        sample = fill(one, sketch, processor)
        found = boxes(sketch, all_turns(one, processor), processor.tokenizer)
        ids = [number for box in found for number in (box.ids or [-1] * box.count)]
        assert ids == sample.tokens.tolist()
        assert [box.position for box in found] == [sum(b.count for b in found[:i]) for i in range(len(found))]
        question, answer = (message["content"] for message in one.messages)
        if one.images and "<image>" not in question:
            question = f"<image>\n{question}"
        for image in range(len(one.images)):
            tags = "".join(box.text for box in found if box.kind == TAG and box.image == image)
            question = question.replace("<image>", f"<Image>{tags}</Image>", 1)
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        assert "".join(box.text for box in found) == text
        keys = key_boxes(sketch, processor.tokenizer)
        assert [number for box in keys for number in (box.ids or [-1] * box.count)] == sample.cross_tokens.tolist()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_boxes_say_what_is_learned_and_whose_words_they_are(config, arch):
    made = config(arch)
    for index in range(3):
        one = record(made, index)
        processor, sketch = sketched(made, one)
        sample = fill(one, sketch, processor)
        found = boxes(sketch, all_turns(one, processor), processor.tokenizer)
        trained = [box.kind == LEARNED for box in found for _ in range(box.count)]
        assert trained == [False, *(label >= 0 for label in sample.labels.tolist()[:-1])]
        assert learned(sketch) == sum(trained)
        shown = [(box.image, box.tile) for box in found if box.kind == TILE]
        tagged = [(box.image, box.tile) for box in found if box.kind == TAG and box.text == ">"]
        assert tagged == shown if arch != "xattn" else not shown
        said = "".join(box.text for box in found if box.kind == "user")
        assert said.strip() == one.messages[0]["content"].replace("<image>", "").strip()


def test_roles_of_system_context_and_document(config):
    made = config("decoder", "data.system=Be user.")
    messages = [
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "assistant", "loss": False},
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "ok"},
    ]
    one = Record("r", messages, [])
    processor, sketch = sketched(made, one)
    found = boxes(sketch, all_turns(one, processor), processor.tokenizer)
    spelled = {kind: "".join(box.text for box in found if box.kind == kind) for kind in {box.kind for box in found}}
    assert spelled["system"] == "Be user." and spelled["user"] == "useruser" and spelled["assistant"] == "assistant"
    assert spelled["learned"] == "ok<|im_end|>"
    document = Record("d", [{"role": "document", "content": "Once."}], [])
    processor, sketch = sketched(made, document)
    kinds = [box.kind for box in boxes(sketch, all_turns(document, processor), processor.tokenizer)]
    assert kinds[0] == "document" and set(kinds[1:]) == {"learned"}  # nothing predicts the first token
    assert learned(sketch) == len(kinds) - 1


@pytest.mark.parametrize("arch", ["xattn", "hybrid"])
def test_who_sees_which_tile_is_the_model_s_rule(config, arch):
    """Token by token and key by key, the matrix says what the kernels' rule says."""
    made = config(arch)
    one = record(made, 0)
    processor, sketch = sketched(made, one)
    sample = fill(one, sketch, processor)
    seen = sight(sample)
    rows = [i for i, stretch in enumerate(seen.stream) for _ in range(stretch.count)]
    columns = [j for j, stretch in enumerate(seen.keys) for _ in range(stretch.count)]
    zero = torch.zeros((), dtype=torch.long)
    for token in range(len(sample.tokens)):
        for key in range(len(sample.cross_tokens)):
            numbers = (sample.image[token], sample.tile[token], zero, sample.cross_image[key], sample.cross_tile[key])
            assert seen.seen[rows[token]][columns[key]] == bool(sees(zero, *numbers))
    if arch == "xattn":
        bound = [row for stretch, row in zip(seen.stream, seen.seen) if stretch.bound]
        assert len(bound) == 8 and all(sum(row) == 1 for row in bound)
    assert not any(seen.seen[0]) and all(seen.seen[-1])


@pytest.mark.parametrize("arch", ["decoder", "hybrid"])
def test_rows_are_those_that_the_loader_makes(config, arch):
    made = config(arch)
    records = build_records(made.data, made.seed)
    order = build_order(made.data.source, records, made.seed, 12)
    for rank in range(2):
        steps = Steps(records, processor(made), order, 4, 2, 300, rank, 2, window=2)
        step = packed(steps)
        assert step.skipped == len(steps.planned(0)[0].skipped)
        batches = steps[0].micro_batches
        assert len(batches) == len(step.replicas[rank])
        for batch, rows in zip(batches, step.replicas[rank]):
            names = tuple(tuple(records.name(one.index) for one in row.samples) for row in rows)
            ids = {records.name(i): (records[i].id if i < 3 else "") for i in range(6)}
            assert tuple(tuple(ids[name] for name in row) for row in names) == (batch.ids if rows else ())
            for row in rows:
                assert row.padded == (batch.tokens.shape[1], batch.cross_tokens.shape[1])
        text, keys = step.padding
        assert 0 <= text < 1 and 0 <= keys < 1


def test_histograms_hold_every_value():
    values = Counter({0: 3, 7: 1, 99: 2, 1000: 5})
    made = histogram("a", "b", values)
    assert sum(bar.count for bar in made.bars) == 11 and len(made.bars) <= 32
    for bar in made.bars:
        assert bar.count == sum(count for value, count in values.items() if bar.low <= value <= bar.high)
    assert [quantile(values, share) for share in (0, 0.5, 0.9, 1)] == [0, 99, 1000, 1000]
    assert histogram("a", "b", Counter({5: 2})).bars[0].count == 2


@pytest.mark.parametrize("chat", ["llama3", "vicuna", "mistral"])
def test_words_are_told_from_a_chat_format_that_is_tokenised_together_with_them(tmp_path, config, chat):
    names = "<s> </s> [INST] [/INST] <|start_header_id|> <|end_header_id|> <|eot_id|>".split()
    values = json.loads(TINY.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"] += [{"id": 512 + i, "content": n, "special": True, **flags} for i, n in enumerate(names)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    words = (f"llm.tokenizer={tmp_path}", "llm.vocab=600", "llm.bos='<s>'", f"llm.chat={chat}", "data.system=Be kind.")
    made = config("decoder", *words)
    one = record(made, 2)
    processor, sketch = sketched(made, one)
    found = boxes(sketch, all_turns(one, processor), processor.tokenizer)
    assert [number for box in found for number in box.ids] == fill(one, sketch, processor).tokens.tolist()
    spelled = {kind: "".join(box.text for box in found if box.kind == kind).strip() for kind in ("system", "user")}
    assert spelled == {"system": "Be kind.", "user": "no picture"}
    answer = "".join(box.text for box in found if box.kind == LEARNED)
    assert answer.strip().startswith(one.messages[1]["content"]) and answer.endswith(("</s>", "<|eot_id|>"))


def test_embedded_pictures_are_bounded():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1400, 3), dtype=np.uint8))
    file, small = (
        io.BytesIO(base64.b64decode(data_url(image, 800, 20_000).partition(",")[2]))
        for image in (noise, noise.crop((0, 0, 50, 20)))
    )
    assert len(file.getvalue()) <= 20_000 and max(Image.open(file).size) <= 800
    assert Image.open(small).size == (50, 20)
