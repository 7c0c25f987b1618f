"""Bad input, in every source that can hold it: the rules of the table in docs/data.md."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.data.look import check_data
from nvlm.data.outline import build_processor
from nvlm.data.record import BadRecord, one_record
from nvlm.data.samples import encode
from nvlm.data.sources import memory
from nvlm.data.sources.registry import build_records
from nvlm.tiling.grid import plan_tiles
from nvlm.tiling.pixels import tile_image

TALK = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A square."}]
LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SOURCES = {"jsonl": "jsonl", "json": "llava", "jsonl.gz": "jsonl", "parquet": "parquet", "saved": "datasets"}
MEMORY = "memory"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def processor(configured):
    return build_processor(configured("arch=decoder", "data.seq_length=2000"), placement_rule("decoder"))


def write(kind: str, rows: list[dict], folder: Path) -> Path:
    """A file, or a folder, of a source, with `rows`."""
    path = folder / f"r.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        Dataset.from_list(rows).save_to_disk(path)
    return path


def records_of(kind: str, rows: list[dict], folder: Path, *words: str):
    if kind == MEMORY:
        return memory.records(rows, folder)
    path = write(kind, rows, folder)
    where = (f"data.path={path}", f"data.root={folder}")
    return build_records(compose_config(f"data={SOURCES[kind]}", *where, *words).data, seed=0)


def reason_of(records, index: int, processor) -> str:
    """Why a record is bad."""
    with pytest.raises(BadRecord) as caught, one_record():
        encode(records[index], processor)
    return str(caught.value)


def row_of(image, kind: str, place: str = "image") -> dict:
    turns = {"conversations": LLAVA} if kind == "json" else {"messages": TALK}
    return {"id": "7", **turns, place: image}


# Images

SQUARE = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((20, 20), np.uint8)))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


def palette() -> Image.Image:
    image = SQUARE.convert("RGB").quantize(6)
    image.info["transparency"] = bytes((0, 99, 255, 255, 255, 255))
    return image


RED, BLUE = Image.new("RGB", (60, 40), (255, 0, 0)), Image.new("RGB", (60, 40), (0, 0, 255))
GREY = SQUARE.convert("RGB")
IMAGES = {  # what is stored, and the RGB image that it is read as
    "an animated GIF": (saved(RED, "GIF", save_all=True, append_images=[BLUE, RED]), RED),
    "CMYK": (saved(Image.new("CMYK", (60, 40), (0, 255, 255, 0)), "TIFF"), RED),
    "16-bit": (saved(Image.fromarray(np.asarray(SQUARE).astype(np.uint16) * 257), "PNG"), GREY),
    "a palette with alpha": (saved(palette(), "PNG", transparency=palette().info["transparency"]), GREY),
    "EXIF rotation": (saved(GREY, "PNG", exif=turned()), GREY),
    "1 x 5000 pixels": (saved(Image.new("RGB", (1, 5000), (9, 8, 7)), "PNG"), Image.new("RGB", (1, 5000), (9, 8, 7))),
    "5000 x 1 pixels": (saved(Image.new("L", (5000, 1), 7), "PNG"), Image.new("RGB", (5000, 1), (7, 7, 7))),
}


@pytest.mark.parametrize("kind", [*SOURCES, MEMORY])
def test_unusual_images_are_read_by_their_rule_in_every_source(tmp_path, processor, kind):
    rows = []
    for number, (data, _) in enumerate(IMAGES.values()):
        (tmp_path / f"{number}.jpg").write_bytes(data)  # the extension is wrong: content decides
        as_bytes = kind in ("parquet", "saved", MEMORY)
        rows.append(row_of({"bytes": data, "path": None} if as_bytes else f"{number}.jpg", kind))
    records = records_of(kind, rows, tmp_path)
    for number, (_, expected) in enumerate(IMAGES.values()):
        sample = encode(records[number], processor)
        plan = plan_tiles(*expected.size, processor.max_tiles, processor.tile_size)
        assert sample.pixels.equal(tile_image(expected, plan)), list(IMAGES)[number]


@pytest.mark.parametrize("kind", [*SOURCES, MEMORY])
def test_images_that_cannot_be_used_are_skipped_and_named_in_every_source(tmp_path, processor, kind):
    (tmp_path / "outside").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "outside" / "a.png").write_bytes(saved(RED, "PNG"))
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "outside" / "a.png")
    (tmp_path / "in" / "empty.png").write_bytes(b"")
    (tmp_path / "in" / "text.png").write_text("not an image")
    (tmp_path / "in" / "cut.png").write_bytes(saved(SQUARE.resize((300, 300)), "PNG")[:400])
    cases = [
        ([None], "image 1 of 1 in `images` is null, expected a path"),
        (["empty.png"], "empty.png: not an image of a known format"),
        (["text.png"], "text.png: not an image of a known format"),
        (["cut.png"], "cut.png: .*(truncated|unexpected end|broken)"),
        (["gone.png"], "gone.png: no such image"),
        (["link.png"], "link.png is a link to .*links out of .* are not followed: set data.root"),
        (["../outside/a.png"], "image path leaves the data folder"),
        (["http://a.b/c.png"], "is a URL, expected a path: download it first"),
        ([], "1 <image> marks, but 0 images"),
    ]
    rows = [row_of(images, kind, "images") for images, _ in cases]
    records = records_of(kind, rows, tmp_path / "in")
    for number, (_, reason) in enumerate(cases):
        with pytest.raises(BadRecord, match=reason), one_record():
            encode(records[number], processor)


# Files


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet", "saved"])
def test_a_file_without_records_is_refused_before_the_run(tmp_path, kind):
    path = tmp_path / f"r.{kind}"
    contents = [b"", b" \n\n", b"[]"] if kind != "parquet" else [b"", b"PAR1", b"PAR1PAR1"]
    for content in contents if kind != "saved" else [None]:
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(gzip.compress(content) if kind == "jsonl.gz" else content)
        config = compose_config(f"data={SOURCES[kind]}", f"data.path={path}")
        with pytest.raises(ConfigError, match="^data.path: got .*, expected .* Fix: "):
            build_records(config.data, 0)
        with pytest.raises(ConfigError, match="^data.path: got .*, expected .* Fix: "):
            check_data(config, placement_rule("hybrid"))


@pytest.mark.parametrize("kind", [*SOURCES, MEMORY])
def test_a_wrong_column_and_an_empty_answer_are_skipped_and_named(tmp_path, processor, kind):
    rows = [
        {"dialogue": SAID},
        {"messages": [SAID[0], {"role": "assistant", "content": " "}]},
        {"messages": [SAID[0], {"role": "assistant", "content": None}]},
        {"messages": [{"role": "user", "content": "word " * 9000}, SAID[1]]},
    ]
    records = records_of(kind, [{"dialogue": None, "messages": None} | row for row in rows], tmp_path)
    for index, reason in enumerate(
        (
            "no list of messages or conversations",
            "no text to learn: every assistant turn with loss is empty",
            "content of a message of role assistant is null",
            "the text takes 45... tokens, data.seq_length is 2000",
        )
    ):
        with pytest.raises(BadRecord, match=reason):
            encode(records[index], processor)
        assert records.name(index)


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "txt"])
def test_a_byte_order_mark_is_left_out_and_bad_utf8_is_named(tmp_path, processor, kind):
    row = b"Good \xc3\xa9." if kind == "txt" else json.dumps({"messages": SAID}).encode()
    other = row.replace(b"yes", b"\xff\xfe") if kind != "txt" else b"Bad \xff\xfe."
    path = tmp_path / f"r.{kind}"
    source = "text" if kind == "txt" else SOURCES[kind]
    data = compose_config(f"data={source}", f"data.path={path}").data

    def store(content: bytes) -> None:
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)

    store(b"\xef\xbb\xbf" + (b"[%s]" % row if kind == "json" else row))
    (message, *_) = build_records(data, 0)[0].messages
    assert not message["content"].startswith("\ufeff")
    store(b"[%s,%s]" % (row, other) if kind == "json" else other if kind == "txt" else row + b"\n" + other + b"\n")
    if kind == "json":  # a list is one text
        with pytest.raises(ConfigError, match="which is not UTF-8 at byte"):
            build_records(data, 0)
        return
    records = build_records(data, 0)
    assert "utf-8" in reason_of(records, len(records) - 1, processor).lower()


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_a_mark_in_a_text_from_the_web_is_text(tmp_path, processor, kind):
    path = write(kind, [{"text": "An <image> tag"}, {"text": "x"}], tmp_path)
    records = build_records(compose_config("data=text", f"data.path={path}").data, 0)
    sample = encode(records[0], processor)
    assert not len(sample.pixels) and processor.tokenizer.encode("<image>")[0] in sample.tokens.tolist()
    assert "<image>" in processor.tokenizer.tokenizer.decode(sample.tokens.tolist())


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "saved"])
def test_boxes_outside_an_image_and_empty_answers_of_a_task_are_skipped_and_named(tmp_path, processor, kind):
    (tmp_path / "a.png").write_bytes(saved(RED, "PNG"))
    boxes = [[0, 0, 60, 40], [0, 0, 61, 40], [5, 5, 5, 9], [-1, 0, 5, 5]]
    rows = [{"image": "a.png", "text": ["EXIT"], "boxes": [box]} for box in boxes]
    records = records_of(kind, rows, tmp_path, "data.task=ocr")
    assert records[0].messages[1]["content"] == "<ref>EXIT</ref><box>(0,0),(999,999)</box>"
    for index, reason in ((1, "not inside the image of 60 x 40 px"), (2, "is empty"), (3, "not inside")):
        assert reason in reason_of(records, index, processor)
    (tmp_path / f"r.{kind}").rename(tmp_path / "first")
    asked = [{"image": "a.png", "question": "What?", "answer": answer} for answer in ("", " ", None, "red")]
    records = records_of(kind, asked, tmp_path, "data.task=vqa")
    reasons = [reason_of(records, index, processor) for index in range(3)]
    assert reasons == ["`answer` is empty", "`answer` is empty", "`answer` is null, expected text"]


# Blends


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ("[{name: a, source: pages, weight: 1}, {name: a, source: pages, weight: 1}]", "two sources of the name a"),
        ("{a: {source: jsonl, path: r.jsonl, weight: 0}}", "data.sources.a.weight"),
        ("{a: {source: jsonl, path: r.jsonl, weight: .nan}}", "data.sources.a.weight"),
        ("{a: {source: jsonl, path: r.jsonl, weight: -1}}", "data.sources.a.weight"),
    ],
)
def test_two_sources_of_one_name_and_weights_of_zero_or_nan_are_refused(sources, reason):
    with pytest.raises(ConfigError, match=reason):
        compose_config("data=blend", f"data.sources={sources}")
