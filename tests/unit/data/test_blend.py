"""Blends: shares by weight, epochs and text, records by source, held-out records of all sources, faults by name."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from itertools import islice

import pytest
import torch
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.commands.compose import check_overrides, effective
from nvlm.config.values import ConfigError
from nvlm.data.batch import Batch
from nvlm.data.blend import Blended, build_order, shares_of
from nvlm.data.loader import Steps
from nvlm.data.look import check_data
from nvlm.data.outline import build_processor
from nvlm.data.record import BadRecord
from nvlm.data.sources.registry import build_records

COUNTS = {"pages": 40, "chat": 10, "text": 25}


@pytest.fixture
def folder(tmp_path):
    """Three files of records of different lengths; those of `text` have no image."""
    for number in range(3):
        Image.new("RGB", (60 + 200 * number, 60)).save(tmp_path / f"{number}.png")
    for name, count in COUNTS.items():
        rows = [
            {
                "messages": [
                    {"role": "user", "content": "say " * (1 + i % 7)},
                    {"role": "assistant", "content": f"{name} {i}"},
                ],
                "images": [] if name == "text" else [f"{i % 3}.png"],
            }
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def blended(folder, configured):
    """The configuration of a blend; keywords are the sources' own keys."""

    def build(*overrides, **sources):
        parts = [
            f"{name}: {{source: jsonl, path: {folder}/{name}.jsonl, heldout_path: {folder}/{name}.jsonl, {keys}}}"
            for name, keys in sources.items()
        ]
        return configured("data=blend", "data.workers=0", f"data.sources={{{', '.join(parts)}}}", *overrides)

    return build


def shares(config):
    return shares_of(config.data.source, COUNTS)


def test_shares_by_weight_by_epochs_and_by_text(blended):
    assert shares(blended(pages="weight: 3", chat="weight: 1")) == {"pages": 0.75, "chat": 0.25}
    assert shares(blended(pages="epochs: 1", chat="epochs: 4")) == {"pages": 0.5, "chat": 0.5}
    assert shares(blended(pages="epochs: 1, take: 'first:10'", chat="epochs: 1")) == {"pages": 0.5, "chat": 0.5}
    text = blended("data.text_share=0.2", pages="weight: 3", chat="weight: 1", text="weight: 9, text_only: true")
    assert shares(text) == pytest.approx({"pages": 0.6, "chat": 0.2, "text": 0.2})


@pytest.mark.parametrize(
    ("sources", "overrides", "reason"),
    [
        ({"a": "weight: 1", "b": "epochs: 1"}, (), "epochs for b, a weight for others"),
        ({"a": "text_only: true"}, (), "data.sources.a: got neither weight nor epochs"),
        ({"a": "weight: 1, epochs: 1"}, (), "data.sources.a: got both weight and epochs"),
        ({"a": "weight: .nan"}, (), "data.sources.a.weight: got"),
        ({"a": "weight: 0"}, (), "data.sources.a.weight: got 0"),
        ({"a": "weigth: 1"}, (), "data.sources.a.weigth: got a key that does not exist, expected one of weight"),
        ({"a": "weight: 1"}, ("data.text_share=0.5",), "no source with text_only=true"),
        ({"a": "weight: 1, text_only: true"}, ("data.text_share=0.5",), "no other source"),
        ({"a/b": "weight: 1"}, (), "data.sources: got 'a/b'"),
        ({}, (), "data.sources: got nothing"),
    ],
)
def test_a_blend_that_cannot_be_drawn_is_refused(blended, sources, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        blended(*overrides, **sources)


def test_sources_may_be_a_list_with_names_or_a_file(configured, folder):
    inline = configured("data=blend", "data.sources={a: {source: jsonl, path: x, weight: 2}}")
    listed = configured("data=blend", "data.sources=[{name: a, source: jsonl, path: x, weight: 2}]")
    (folder / "mix.yaml").write_text("a: {source: jsonl, path: x, weight: 2}\n")
    read = configured("data=blend", f"data.sources={folder}/mix.yaml")
    assert inline.data == listed.data == read.data
    for wrong, reason in (
        ("[{source: jsonl, path: x, weight: 2}]", "data.sources.0.: got no name"),
        (f"[{','.join(['{name: a, source: jsonl, path: x, weight: 2}'] * 2)}]", "two sources of the name a"),
        (f"{folder}/none.yaml", "none.yaml', expected a YAML file"),
        (f"{folder}/0.png", "which cannot be read"),
    ):
        with pytest.raises(ConfigError, match=reason):
            configured("data=blend", f"data.sources={wrong}")


@pytest.mark.parametrize(
    ("text", "reason", "fix"),
    [
        ("a: {source: jsonl}\nb:\n\tsource: jsonl\n", "cannot start any token", "line 3"),
        ("a: {source: jsonl}\na: {source: llava}\n", "found duplicate key a", "line 2"),
    ],
)
def test_a_damaged_file_of_sources_is_refused_with_the_line(configured, folder, text, reason, fix):
    (folder / "damaged.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"{reason}.*Fix: repair its {fix}$"):
        configured("data=blend", f"data.sources={folder}/damaged.yaml")


@pytest.mark.parametrize("form", ["{}/my mix.yaml", "[{{name: a, source: jsonl, path: x}}]"])
@pytest.mark.parametrize("first", [True, False])
def test_a_key_of_a_source_can_be_typed_beside_a_file_or_list_of_them(form, first, folder):
    """As the fixes of error messages say it: also a key that the source lacks."""
    (folder / "my mix.yaml").write_text("a: {source: jsonl, path: 'x, \"y\" = {z}'}\n")
    words = [f"data.sources={form.format(folder)}", "data.sources.a.weight=3"]
    added = ["data.sources.a.root=my images", "+data.sources.b={source: text, path: t, weight: 1}"]
    (config,) = check_overrides(["data=nvlm_sft", *(words if first else words[::-1]), *added])
    sources = config.data.source.sources
    assert list(sources) == ["a", "b"], "the template's sources are replaced"
    assert (sources["a"].weight, sources["a"].source.root) == (3.0, "my images")
    assert sources["a"].source.path == ("x" if form.startswith("[") else 'x, "y" = {z}')


def test_a_sweep_over_a_key_of_a_source_keeps_its_flag_in_front(folder):
    (folder / "one.yaml").write_text("a: {source: jsonl, path: 'a,b', weight: 1}")
    words = ["-m", "data=blend", f"data.sources={folder}/one.yaml", "data.sources.a.weight=4,5"]
    assert effective(words)[0] == "-m" and effective(words)[-1] == "++data.sources.a.weight=4,5"
    found = [config.data.source.sources["a"] for config in check_overrides(effective(words))]
    assert [(part.weight, part.source.path) for part in found] == [(4.0, "a,b"), (5.0, "a,b")]


def test_a_source_of_a_file_can_be_left_out_and_a_wrong_name_is_refused(folder):
    (folder / "two.yaml").write_text("{a1: {source: jsonl, path: x, weight: 1}, b: {source: text, path: y, weight: 1}}")
    file = f"data.sources={folder}/two.yaml"
    (config,) = check_overrides(["data=blend", file, "data.sources.b=null"])
    assert list(config.data.source.sources) == ["a1"]
    with pytest.raises(ConfigError, match="data.sources.a2: got no source.* a1, b. Fix: data.sources.a1.weight=2, or"):
        check_overrides(["data=blend", file, "data.sources.a2.weight=2"])
    with pytest.raises(ConfigError, match="data.sources.b.pth: got a key that does not exist.*data.sources.b.path"):
        check_overrides(["data=blend", file, "data.sources.b.pth=x"])


def test_records_say_which_source_they_are_of(blended):
    config = blended(chat="weight: 1", text="weight: 1, text_only: true", pages="weight: 1, text_only: true")
    records = build_records(config.data, config.seed)
    assert isinstance(records, Blended) and len(records) == 75
    assert records.name(10) == "text/text.jsonl:1" and records.kind(10) == "text"
    assert records[9].messages[1]["content"] == "chat 9" and records[34].messages[1]["content"] == "text 24"
    with pytest.raises(BadRecord, match="1 images, but data.sources.pages.text_only=true"):
        records[35]
    with pytest.raises(IndexError):
        records[75]


def test_any_first_part_of_the_held_out_records_has_all_sources(blended):
    config = blended(pages="weight: 1", chat="weight: 1", text="weight: 1")
    records = build_records(config.data, config.seed, heldout=True)
    kinds = [records.kind(index) for index in range(15)]
    assert Counter(kinds) == {"pages": 8, "chat": 2, "text": 5}
    assert len({records.name(index) for index in range(len(records))}) == 75
    assert [records[index].messages[1]["content"].split()[0] for index in range(15)] == kinds


def test_each_source_is_checked_before_the_run(blended, folder):
    check_data(blended(pages="weight: 1", chat="weight: 1"), placement_rule("hybrid"))
    (folder / "chat.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="data.sources.chat.path: got .*chat.jsonl: its first record is unusable"):
        check_data(blended(pages="weight: 1", chat="weight: 1"), placement_rule("hybrid"))


def steps_of(config, rank=0, size=1):
    records = build_records(config.data, config.seed)
    return Steps(
        records,
        build_processor(config, placement_rule("hybrid")),
        build_order(config.data.source, records, config.seed, 12),
        steps=6,
        micro_batch=1,
        row_length=100,
        data_rank=rank,
        data_size=size,
        window=3,
    )


def rows(config, size: int, step: int) -> dict[int, Batch]:
    """The rows of a step of all replicas by their place in the run; micro-batches hold one row each."""
    found = [batch for rank in range(size) for batch in steps_of(config, rank, size)[step].micro_batches]
    return {int(batch.place[0, 0]): batch for batch in found if batch.ids[0]}


@pytest.mark.parametrize("mixing", ["records", "steps"])
def test_the_global_batch_is_the_same_on_any_number_of_replicas(blended, mixing):
    config = blended(f"data.mixing={mixing}", pages="weight: 2", chat="weight: 1", text="weight: 1, text_only: true")
    for step in range(6):
        two, three = rows(config, 2, step), rows(config, 3, step)
        assert two.keys() == three.keys() and two
        for place, batch in two.items():
            for field in fields(Batch):
                one, other = (getattr(x, field.name) for x in (batch, three[place]))
                assert torch.equal(one, other) if torch.is_tensor(one) else one == other, field.name


def test_step_by_step_the_rows_of_a_step_are_of_one_source(blended):
    config = blended("data.mixing=steps", pages="weight: 1", chat="weight: 1")
    order = steps_of(config).order
    names = ("pages", "chat")
    for step in range(6):
        ids = [name for batch in steps_of(config)[step].micro_batches for row in batch.ids for name in row]
        assert {name.split(".")[0] for name in ids} == {names[order.source_of(step)]} and len(ids) == 12
    assert {order.source_of(step) for step in islice(range(6), 6)} == {0, 1}
