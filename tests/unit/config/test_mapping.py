"""Dataclasses inside lists, mappings and unions: built from plain values, and one form of message."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Annotated

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nvlm.config import data
from nvlm.config.data import DataConfig
from nvlm.config.fields import Choice, FilePath, Range, Tag
from nvlm.config.keys import near_keys
from nvlm.config.mapping import from_mapping, kinds_of, leaves, to_mapping
from nvlm.config.values import ConfigError
from nvlm.runs.ownership import flat


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    source: Annotated[str, Choice("drawn")]
    records: Annotated[int, Range(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    source: Annotated[str, Choice("file")]
    path: Annotated[str, FilePath()]


Either = Annotated[Drawn | File, Tag("source")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A source, whose keys stand beside the weight."""

    weight: Annotated[float, Range(above=0, example=1)]
    source: Either


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    listed: list[Part]
    fixed: tuple[Part, ...]
    named: dict[str, Part]
    nested: Either | None
    numbers: tuple[Annotated[int, Range(1)], ...]


DRAWN = {"weight": 2.0, "source": "drawn", "records": 7}
FILE = {"weight": 0.5, "source": "file", "path": "r.jsonl"}
VALUES = {
    "listed": [dict(DRAWN), dict(FILE)],
    "fixed": [dict(FILE)],
    "named": {"pages": dict(DRAWN), "own": dict(FILE)},
    "nested": {"source": "file", "path": "s"},
    "numbers": [1, 2],
}


def changed(key: str, value=None) -> dict:
    """VALUES with `value` at the dotted `key`; None deletes it."""
    values = place = copy.deepcopy(VALUES)
    *groups, leaf = key.split(".")
    for group in groups:
        place = place[int(group) if isinstance(place, list) else group]
    place[leaf] = value
    if value is None:
        del place[leaf]
    return values


def test_lists_mappings_and_unions_of_dataclasses_are_built():
    drawn = Part(weight=2.0, source=Drawn(source="drawn", records=7))
    file = Part(weight=0.5, source=File(source="file", path="r.jsonl"))
    assert from_mapping(Blend, VALUES) == Blend(
        listed=[drawn, file],
        fixed=(file,),
        named={"pages": drawn, "own": file},
        nested=File(source="file", path="s"),
        numbers=(1, 2),
    )
    assert from_mapping(Blend, VALUES | {"nested": None, "named": {}}).nested is None


def test_what_was_built_is_written_as_it_was_read():
    written = to_mapping(from_mapping(Blend, VALUES))
    assert OmegaConf.to_container(OmegaConf.create(written)) == VALUES
    assert from_mapping(Blend, OmegaConf.to_container(OmegaConf.create(written))) == from_mapping(Blend, VALUES)


NO_KEY = "a key that does not exist"


@pytest.mark.parametrize(
    ("key", "value", "got", "expected", "fix"),
    [
        ("listed.1.weight", 0, "0.0", "above 0", "data.listed.1.weight=1"),
        ("listed.1.weight", "x", "'x'", "a number", "data.listed.1.weight=1"),
        ("fixed.0.weight", -1, "-1.0", "above 0", "data.fixed.0.weight=1"),
        ("named.pages.weight", True, "True", "a number", "data.named.pages.weight=1"),
        ("named.pages.records", 0, "0", "at least 1", "data.named.pages.records=1"),
        ("named.own.source", "fiel", "'fiel'", "one of drawn, file", "data.named.own.source=file"),
        ("named.own.source", 3, "3", "one of drawn, file", "data.named.own.source=drawn"),
        ("named.own.source", None, "nothing", "one of drawn, file", "data.named.own.source=drawn"),
        ("named.own.path", None, "nothing", "a path, without a NUL character", "data.named.own.path=..."),
        ("named.own.records", 1, NO_KEY, "one of path, source, weight", "leave it out"),
        ("listed.0.wieght", 1, NO_KEY, "one of weight", "data.listed.0.weight=..."),
        ("nested", {"source": "drawn", "path": "s"}, NO_KEY, "one of records, source", "leave it out"),
        ("nested", "file", "'file'", "a group of keys", "data.nested.source=..."),
        ("listed", "pages", "'pages'", "a list", "data.listed=[pages]"),
        ("listed", ["pages"], "'pages'", "a group of keys", "data.listed.0.KEY=..."),
        ("named", ["pages"], "['pages']", "a mapping", "data.named={name:1}"),
        ("numbers", [1, 0], "0", "at least 1", "data.numbers=[1]"),
    ],
)
def test_a_mistake_is_told_with_its_whole_path_and_a_fix(key, value, got, expected, fix):
    place = re.sub(r"\.(\d+)", r"[\1]", key) + {"nested": ".path"}.get(key if got == NO_KEY else "", "")
    place += "[0]" if value == ["pages"] and key == "listed" else ""
    with pytest.raises(ConfigError) as caught:
        from_mapping(Blend, changed(key, value), "data.")
    assert str(caught.value) == f"data.{place}: got {got}, expected {expected}. Fix: {fix}"


@pytest.mark.parametrize(
    ("cls", "key", "value", "expected", "fix"),
    [
        (data.Blend, "text_share", "20%", "a number", "0.2"),
        (data.Jsonl, "path", ["a", "b"], "a file, a folder or a glob", "FILE"),
        (data.Jsonl, "task", 1.5, "text", "caption"),
    ],
)
def test_a_value_of_another_type_gets_a_fix_within_the_limits(cls, key, value, expected, fix):
    values = {"source": cls.__name__.lower(), "sources": None, "text_share": None, "mixing": "steps"}
    given = {name: value for name, value in values.items() if name in kinds_of(cls)} | {key: value}
    with pytest.raises(ConfigError, match=re.escape(f"expected {expected}. Fix: data.{key}={fix}") + "$"):
        from_mapping(cls, given, "data.")


@pytest.fixture
def composed(tmp_path):
    """A function from words of a command line to VALUES as Hydra changes them."""
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"data": VALUES})))

    def compose_them(*words: str) -> dict:
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            return OmegaConf.to_container(compose("config", overrides=list(words)))["data"]

    return compose_them


@pytest.mark.parametrize("key", ["listed.1.weight", "fixed.0.weight", "named.pages.weight"])
def test_the_fix_of_a_message_can_be_typed(composed, key):
    with pytest.raises(ConfigError) as caught:
        from_mapping(Blend, composed(f"data.{key}=-3"), "data.")
    fix = re.search(r"Fix: (\S+)$", str(caught.value))[1]
    assert fix == f"data.{key}=1"
    assert from_mapping(Blend, composed(fix), "data.") == from_mapping(Blend, changed(key, 1))


def test_whole_lists_and_mappings_can_be_typed(composed):
    words = ["data.listed=[{source:file,path:a,weight:3}]", "+data.named.more={source:drawn,records:1,weight:1}"]
    built = from_mapping(Blend, composed(*words), "data.")
    assert built.listed == [Part(weight=3.0, source=File(source="file", path="a"))]
    assert list(built.named) == ["pages", "own", "more"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("named.pages.wieght", ["named.pages.weight"]),
        ("named.pagse.weight", ["named.pages.weight"]),
        ("listed.1.wieght", ["listed.1.weight"]),
        ("nestd.path", ["nested.path"]),
    ],
)
def test_a_key_inside_lists_and_mappings_is_answered_with_the_closest(typed, meant):
    assert near_keys(typed, list(flat(VALUES)))[:1] == meant


def test_leaves_are_all_keys_that_may_be_typed():
    keys = [key for key, _ in leaves(Blend)]
    part = ["weight", "source", "records", "source", "path"]
    lists = [f"{place}.*.{key}" for place in ("listed", "fixed", "named") for key in part]
    assert keys == [*lists, "nested.source", "nested.records", "nested.source", "nested.path", "numbers"]


def test_no_source_has_a_key_of_the_configuration_that_it_stands_in():
    own = kinds_of(DataConfig)
    for variant in own["source"].variants:
        assert set(kinds_of(variant)) & set(own) == {"source"}
