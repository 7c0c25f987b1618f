"""Documents: texts from the web, alone or with images between them, in JSON, Parquet and plain text files."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from nvlm.arch.registry import placement_rule
from nvlm.config.values import ConfigError
from nvlm.data.batch import IGNORE
from nvlm.data.forms import auto, text
from nvlm.data.look import check_data
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
    (tmp_path / "a.txt").write_text("word " * 9000)
    with pytest.raises(ConfigError, match="a.txt: the text takes .* tokens, data.seq_length is"):
        records_of(configured, "data=text", f"data.path={tmp_path / '*.txt'}")
