"""LLaVA's format, and JSON files that are one list: entries are found, read and named, faults are reported by name."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.config.values import ConfigError
from nvlm.data.forms import auto
from nvlm.data.look import check_data
from nvlm.data.outline import build_processor
from nvlm.data.record import BadRecord
from nvlm.data.samples import encode
from nvlm.data.sources.json_file import JsonFile
from nvlm.data.sources.json_rows import records_of
from nvlm.data.sources.registry import build_records

TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
MESSAGES = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A cat."}]


def entry(**keys) -> dict:
    return {"id": "7", "image": "a.png", "conversations": TALK} | keys


def read(row, tmp_path):
    return auto.read(row, "f[0]", tmp_path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "images" / "a.png")
    return tmp_path


def test_an_entry_is_the_record_with_the_same_messages(tmp_path):
    record = read(entry(), tmp_path)
    assert (record.id, record.messages, record.images) == ("7", MESSAGES, [tmp_path / "a.png"])
    assert read(entry(image=["a.png", "b/c.png"]), tmp_path).images == [tmp_path / "a.png", tmp_path / "b" / "c.png"]
    for nothing in (None, "", []):  # text alone
        assert read(entry(image=nothing), tmp_path).images == []
    assert read({"conversations": TALK, "image": "a.png"}, tmp_path).id == "f[0]"
    system = [{"from": "system", "value": "Be brief."}, *TALK]
    assert read(entry(conversations=system), tmp_path).messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (entry(image="../a.png"), "leaves the data folder"),
        (entry(image=7), "`image` is a number, expected a path"),
        (entry(video="a.mp4"), "1 <image> and 0 <video> marks, but 1 images and 1 videos"),
        (entry(conversations=None), "no list of messages or conversations"),
        (entry(conversations=[{"from": "robot", "value": "hi"}]), "a turn from 'robot', expected one of human"),
        (entry(conversations=[{"from": ["human"], "value": "hi"}]), r"a turn from \['human'\]"),
        (entry(conversations="hi"), "no list of conversations"),
        ([entry()], "a list, expected an object"),
    ],
)
def test_what_cannot_be_read_is_said_by_name(row, reason, tmp_path):
    with pytest.raises(BadRecord, match=reason):
        read(row, tmp_path)


def test_unknown_keys_of_a_turn_are_refused_as_in_messages(configured, tmp_path):
    processor = build_processor(configured("arch=decoder"), placement_rule("decoder"))
    named = [{"from": "human", "value": "hi", "name": "Eve"}, TALK[1]]
    with pytest.raises(BadRecord, match="key 'name' of a message of role user is not supported"):
        encode(read(entry(conversations=named, image=None), tmp_path), processor)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_and_lines_give_the_same_records(folder, configured, indent):
    rows = [
        entry(id="é 漢"),
        entry(id='] } " \\'),
        entry(image=None, conversations=[TALK[0] | {"value": "?"}, TALK[1]]),
    ]
    (folder / "l.json").write_text("\ufeff " + json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    (folder / "l.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    found = []
    for name in ("l.json", "l.jsonl"):
        data = configured("data=llava", f"data.path={folder / name}", f"data.root={folder / 'images'}").data
        records = build_records(data, seed=0)
        found.append([(r.id, r.messages, r.images) for r in (records[i] for i in range(len(records)))])
    assert found[0] == found[1] and [len(images) for *_, images in found[0]] == [1, 1, 0]
    assert [JsonFile(str(folder / "l.json"), "k").name(i) for i in range(2)] == ["l.json[0]", "l.json[1]"]


def test_messages_may_be_a_list_too_and_images_lie_elsewhere(folder, configured):
    (folder / "m.json").write_text(json.dumps([{"messages": MESSAGES, "images": ["a.png"]}] * 2))
    (folder / "link").symlink_to(folder / "images")
    for root in ("images", "link"):  # a link that is named is followed
        config = configured("data=jsonl", f"data.path={folder / 'm.json'}", f"data.root={folder / root}")
        records = build_records(config.data, seed=0)
        assert len(records) == 2 and records[1].messages == MESSAGES
        assert records[1].images == [folder / "images" / "a.png"]
        check_data(config, placement_rule(config.arch.name))
    with pytest.raises(ConfigError, match="m.json.0.: a.png: no such image.*data.root=DIR, the folder of the images"):
        check_data(configured("data=jsonl", f"data.path={folder / 'm.json'}"), placement_rule("hybrid"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "an empty list"),
        (b"[ \n", "damaged or cut short after 0 elements"),
        (json.dumps([entry()] * 3).encode()[:-40], "damaged or cut short after 2 elements"),
        (b'[{"a": 1} {"a": 2}]', "damaged or cut short after 1 elements"),
        (b'[{"a": 1},]', "damaged or cut short after 1 elements"),
        (b'[{"a": 1}]\n[{"a": 2}]', "more after the end of its list of 1"),
        (b"[" * 100_000, "damaged or cut short after 0 elements"),
        (b'["\xff"]', "not UTF-8 at byte 2"),
    ],
)
def test_a_damaged_list_is_refused_before_the_run(content, reason, tmp_path, configured):
    (tmp_path / "l.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"^data.path: got .*{reason}"):
        records_of(str(tmp_path / "l.json"))
    if "after 2" not in reason:  # the first records of that one can be used
        config = configured("data=llava", f"data.path={tmp_path / 'l.json'}")
        with pytest.raises(ConfigError, match="^data.path: got "):
            check_data(config, placement_rule(config.arch.name))


def test_a_run_is_checked_against_its_first_entries(folder, configured):
    (folder / "l.json").write_text(json.dumps([entry()]))
    looked = configured("data=llava", f"data.path={folder / 'l.json'}")
    with pytest.raises(ConfigError, match=r"l.json\[0\]: a.png: no such image"):
        check_data(looked, placement_rule("hybrid"))
    check_data(
        configured("data=llava", f"data.path={folder / 'l.json'}", f"data.root={folder / 'images'}"),
        placement_rule("hybrid"),
    )


def test_only_the_beginning_of_a_large_list_is_read(folder, configured, monkeypatch):
    monkeypatch.setattr("nvlm.data.sources.json_file._LONGEST", 400)
    (folder / "images" / "l.json").write_text(json.dumps([entry(id="é")] * 50, ensure_ascii=False), encoding="utf-8")
    config = configured("data=llava", f"data.path={folder / 'images' / 'l.json'}")
    check_data(config, placement_rule("hybrid"))
    monkeypatch.setattr("nvlm.data.sources.json_file._LONGEST", 20)
    with pytest.raises(ConfigError, match="whose first object does not end within"):
        check_data(config, placement_rule("hybrid"))
