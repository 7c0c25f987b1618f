"""Documents: texts from the web, alone or with images between them, in JSON, Parquet and plain text files."""

from __future__ import annotations

import base64
import gzip
import json

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from nvlm.arch.registry import placement_rule
from nvlm.config.values import ConfigError
from nvlm.data.batch import IGNORE
from nvlm.data.forms import auto, mmc4, obelics, text
from nvlm.data.look import check_data
from nvlm.data.messages import place_images, read_turns
from nvlm.data.outline import build_processor
from nvlm.data.record import BadRecord
from nvlm.data.samples import encode
from nvlm.data.sources.registry import build_records

MARKED = "A tag <image> and \\<image> stay."


@pytest.fixture
def processor(configured):
    return build_processor(configured("arch=decoder"), placement_rule("decoder"))


def learned(record, processor) -> str:
    sample = encode(record, processor)
    ids = sample.labels[sample.labels != IGNORE].tolist()
    return processor.tokenizer.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.fixture
def texts(tmp_path):
    """Texts in files of all kinds, in folders."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("\ufefffirst\n\nparagraph\n", encoding="utf-8")
    (tmp_path / "sub" / "a.txt").write_text(MARKED)
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"text": "one", "url": "http://a.b"}) + "\n" + json.dumps({"text": ""})
    )
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "zipped", "id": 5}).encode()))
    parquet.write_table(pa.table({"text": ["cell", None], "score": [0.5, 1.0]}), tmp_path / "t.parquet")
    return tmp_path


def records_of(configured, *words):
    config = configured(*words)
    check_data(config, placement_rule(config.arch.name))
    return build_records(config.data, seed=0)


def test_texts_of_all_kinds_of_files_are_documents(texts, configured, processor, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(texts / "cache"))
    records = records_of(configured, "data=text", f"data.path={texts}")
    names = ["b.txt", "a.txt", "t.parquet[0]", "t.parquet[1]", "r.jsonl:1", "r.jsonl:2", "z.jsonl.gz:1"]
    assert [records.name(i) for i in range(len(records))] == names
    good = [records[i] for i in (0, 1, 2, 4, 6)]
    ends = [f"{said}<|endoftext|>" for said in ("first\n\nparagraph\n", MARKED, "cell", "one", "zipped")]
    assert [learned(record, processor).removeprefix(end[0]) for record, end in zip(good, ends)] == [e[1:] for e in ends]
    assert [record.id for record in good[2:]] == ["t.parquet[0]", "r.jsonl:1", "5"]
    with pytest.raises(BadRecord, match="`text` is null, expected text"):
        records[3]
    with pytest.raises(BadRecord, match="no text to learn"):
        encode(records[5], processor)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": 7}, "`text` is a number, expected text"),
        ({"txt": "a"}, "no `text`"),
        ({"text": "a", "image": "a.png"}, "`image` beside `text`: data.task=caption"),
        ({"text": "a", "video": "a.mp4"}, "key `video` is not read"),
        (["a"], "a list, expected an object"),
    ],
)
def test_what_is_no_text_is_refused_by_name(row, reason, tmp_path):
    with pytest.raises(BadRecord, match=reason):
        text.read(row, "r:1", tmp_path)


def test_a_row_with_a_text_and_no_turns_is_a_document_in_every_source(tmp_path):
    assert auto.read({"text": "a", "messages": None}, "r:1", tmp_path).messages[0]["role"] == "document"
    turns = [{"role": "user", "content": "hi"}]
    assert auto.read({"text": "a", "messages": turns}, "r:1", tmp_path).messages == turns
    with pytest.raises(BadRecord, match="no list of messages or conversations"):
        auto.read({"text": ""}, "r:1", tmp_path)


def test_text_files_that_are_missing_or_no_text_are_named(tmp_path, configured):
    with pytest.raises(ConfigError, match="data.path: got '.*gone.txt', expected a text file that exists"):
        records_of(configured, "data=text", f"data.path={tmp_path / 'gone.txt'}")
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    with pytest.raises(ConfigError, match="a.txt: not UTF-8 at byte 3"):
        records_of(configured, "data=text", f"data.path={tmp_path / 'a.txt'}")
    (tmp_path / "a.txt").write_text("word " * 9000)  # longer than a sample: it is cut
    assert len(records_of(configured, "data=text", f"data.path={tmp_path / '*.txt'}")) == 1


# Interleaved documents


@pytest.fixture
def images(tmp_path):
    """A folder with images of different shapes."""
    for name, size in (("a.png", (60, 40)), ("b.png", (20, 70)), ("c.png", (30, 30))):
        Image.new("RGB", size).save(tmp_path / name)
    return tmp_path


def in_bytes(path) -> dict:
    return {"bytes": path.read_bytes(), "path": None}


OBELICS = {
    "images": ["a.png", None, "b.png", None, "c.png"],
    "texts": [None, "About <image> a.", None, "About b.", None],
    "metadata": json.dumps([{"src": "http://a.b/a.png"}, None, None, None, None]),
    "general_metadata": "{}",
}
MMC4 = {
    "text_list": ["First.", "About <image> b.", "More.", "About a."],
    "image_info": [
        {"image_name": "a.png", "raw_url": "http://a.b/a.png", "matched_text_index": 3, "matched_sim": 0.2},
        {"image_name": "b.png", "raw_url": "http://a.b/b.png", "matched_text_index": 1, "matched_sim": 0.3},
    ],
    "similarity_matrix": [[0.1] * 4] * 2,
    "url": "http://a.b",
}


def said(record, processor) -> str:
    """What is learned, with a star for each image."""
    turns = place_images(read_turns(record.messages), len(record.images))
    assert learned(record, processor).endswith("<|endoftext|>")
    return "*".join(turns[0].texts)


def test_obelics_documents_have_their_images_in_place(images, processor):
    record = obelics.read(OBELICS, "r:1", images, 6)
    assert said(record, processor) == "*About <image> a.*About b."  # the last image has no text after it
    assert record.images == [images / "a.png", images / "b.png"]
    assert said(obelics.read(OBELICS, "r:1", images, 1), processor) == "*About <image> a.\n\nAbout b."
    stored = OBELICS | {"images": [image and in_bytes(images / image) for image in OBELICS["images"]]}
    assert obelics.read(stored, "r:1", images, 6).images == [
        (images / name).read_bytes() for name in ("a.png", "b.png")
    ]


def test_mmc4_documents_have_each_image_before_its_sentence(images, processor):
    record = mmc4.read(MMC4, "r:1", images, 6)
    assert said(record, processor) == "First.*About <image> b. More.*About a."
    assert record.images == [images / "b.png", images / "a.png"]
    assert mmc4.read(MMC4, "r:1", images, 1).images == [images / "b.png"]
    text_alone = mmc4.read(MMC4 | {"image_info": None}, "r:1", images, 6)
    assert text_alone.images == [] and said(text_alone, processor) == "First. About <image> b. More. About a."
    data = (images / "a.png").read_bytes()
    stored = {"image_base64": base64.b64encode(data).decode(), "image_name": "gone.png", "matched_text_index": 0}
    assert mmc4.read(MMC4 | {"image_info": [stored]}, "r:1", images, 6).images == [data]


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        (obelics, OBELICS | {"texts": ["a"]}, "not two lists of the same length"),
        (obelics, OBELICS | {"images": None}, "not two lists of the same length"),
        (obelics, {"images": ["a.png"], "texts": ["a"]}, "place 1 has both an image and a text"),
        (obelics, {"images": [None, None], "texts": ["a", None]}, "place 2 has neither an image and a text"),
        (obelics, {"images": ["http://a.b/c.png", None], "texts": [None, "a"]}, "is a URL, expected a path"),
        (obelics, {"images": ["../a.png", None], "texts": [None, "a"]}, "leaves the data folder"),
        (obelics, {"images": [7], "texts": [None]}, "image at place 1 is a number"),
        (obelics, {"images": [None], "texts": [7]}, "the text at place 1 is a number"),
        (mmc4, MMC4 | {"text_list": "a"}, "`text_list` is not a list of texts"),
        (mmc4, MMC4 | {"text_list": ["a", None]}, "`text_list` is not a list of texts"),
        (mmc4, MMC4 | {"image_info": ["a.png"]}, "image 1 of 1 in `image_info` is text, expected an object"),
        (
            mmc4,
            MMC4 | {"text_list": ["a", "b"]},
            "`matched_text_index` of image 1 of 2 is no number of a sentence, 0 to 1",
        ),
        (
            mmc4,
            MMC4 | {"image_info": [{"image_name": None, "matched_text_index": 0}]},
            "`image_name` of image 1 of 1 is null",
        ),
        (mmc4, MMC4 | {"image_info": [{"image_name": "../a.png", "matched_text_index": 0}]}, "leaves the data folder"),
        (mmc4, ["a"], "a list, expected an object"),
    ],
)
def test_documents_that_cannot_be_read_are_refused_by_name(images, form, row, reason):
    with pytest.raises(BadRecord, match=reason):
        form.read(row, "r:1", images, 6)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_documents_come_from_json_and_parquet_files_and_train(images, configured, processor, kind):
    for name, row in (("obelics", OBELICS), ("mmc4", MMC4)):
        path = images / f"{name}.{kind}"
        if kind == "jsonl":
            path.write_text(json.dumps(row) + "\n" + json.dumps({"other": 1}) + "\n")
        else:
            parquet.write_table(pa.Table.from_pylist([row, dict.fromkeys(row)]), path)
        records = records_of(configured, f"data={name}", f"data.path={path}", "data.most_images=1")
        assert len(records[0].images) == 1 and len(encode(records[0], processor).pixels) > 0
        with pytest.raises(BadRecord, match="not two lists of the same length|`text_list` is not a list of texts"):
            records[1]
