"""Every field states its range, and values outside it are refused."""

from __future__ import annotations

import math

import pytest

from nvlm.commands.compose import check_overrides
from nvlm.config.fields import Choice, FileName, FilePath, Range, Text
from nvlm.config.mapping import from_mapping, leaves, to_mapping
from nvlm.config.values import Config, ConfigError
from nvlm.runs.ownership import flat

NUMBERS = [(key, part) for key, kind in leaves(Config) for part in (kind, *kind.inside) if part.type in (int, float)]


def refused(values: dict, key: str, value) -> str:
    """The message about `values` with `value` at the dotted `key`."""
    *groups, last = key.split(".")
    place = values
    for group in groups:
        place = place[group]
    place[last] = {"one": value} if isinstance(place[last], dict) else value
    with pytest.raises(ConfigError) as caught:
        from_mapping(Config, values)
    return str(caught.value)


def test_every_number_states_its_range():
    assert len(NUMBERS) > 60
    assert [key for key, kind in NUMBERS if not any(isinstance(limit, Range) for limit in kind.limits)] == []


@pytest.mark.parametrize(("key", "kind"), NUMBERS, ids=[key for key, _ in NUMBERS])
def test_a_number_just_outside_its_range_is_refused_and_one_at_its_end_is_not(configured, key, kind):
    (limit,) = kind.limits
    step = 1 if kind.type is int else 1e-6
    outside = [limit.least - step if limit.least is not None else limit.above]
    outside += [limit.most + step] if limit.most is not None else []
    outside += [limit.below] if limit.below is not None else []
    outside += [math.nan, math.inf, -math.inf] if kind.type is float else [2**63]
    values = to_mapping(configured())
    if key.startswith("data.") and key not in flat(values):
        names = ("source", "form", "about", "records", "heldout_records", "questions")
        pages = {name: values["data"].pop(name) for name in names}
        colours = dict(source="colours", records=1, heldout_records=1, pictures=6, colours=2, shots=4)
        others = {"most_images": {"source": "obelics", "most_images": 6}}
        others |= dict.fromkeys(("pictures", "colours", "shots"), colours)
        own = others.get(key.rpartition(".")[2], pages)
        sources = {"*": own | {"weight": 1.0, "epochs": 1.0}}
        blend = {"source": "blend", "sources": sources, "text_share": 0.5, "mixing": "records"}
        name = key.rpartition(".")[2]
        values["data"] |= own if "*" not in key and name in others else blend
    for value in outside:
        message = refused(values, key, value)
        assert message.startswith(f"{key}") and "\n" not in message, message
        assert "Fix: " in message and str(value)[:4] in message
    inside = limit.least if limit.least is not None else limit.above + 1e-6
    assert inside in limit and (limit.most is None or limit.most in limit)
    assert kind.type(float(limit.instead(outside[0]))) in limit  # what the message suggests


@pytest.mark.parametrize(
    "word",
    [
        "optim.lr=-1e-5", "optim.lr=0", "optim.lr=nan", "optim.beta1=1", "optim.beta2=1.0", "optim.clip=-1",
        "optim.eps=0", "optim.weight_decay=-.1", "optim.warmup=-1", "optim.min_lr=1", "data.row_length=-5",
        "data.max_skipped=5", "data.max_skipped=-1", "data.max_pixels=0", "data.workers=-1", "data.questions=13",
        "data.seq_length=4097", "vision.tile_size=0", "vision.patch=0", "vision.heads=0", "llm.layers=0",
        "llm.head_dim=31", "llm.kv_heads=0", "llm.norm_eps=0", "llm.rope_theta=-1", "llm.rope_scaling={factor:0}",
        "tiling.max_tiles=257", "train.threads=0", "train.spike_factor=.5", "train.stop_seconds=0", "train.keep=0",
        "parallel.timeout_minutes=-1", "parallel.timeout_minutes=inf", "evaluate.batch=0", "evaluate.gallery=-1",
        "seed=-1", "peft.rank=0", "peft.alpha=0", "peft.dropout=1", "precision.edges=-1", "train.steps=1e99",
    ],
)  # fmt: skip
def test_what_no_run_can_have_is_refused(word):
    with pytest.raises(ConfigError) as caught:
        check_overrides([word])
    assert str(caught.value).startswith(f"{word.partition('=')[0]}") and "Fix: " in str(caught.value)


def test_rows_may_be_longer_than_the_model_s_positions(configured):
    """Positions start at 0 in each sample."""
    assert configured("data.row_length=9000").data.row_length == 9000


@pytest.mark.parametrize("suggested", ["llm.max_positions=5000", "data.seq_length=4096"])
def test_either_way_out_of_too_few_positions_can_be_typed(configured, suggested):
    with pytest.raises(ConfigError, match="llm.max_positions=4096") as caught:
        configured("data.seq_length=5000")
    assert suggested in str(caught.value)
    configured("data.seq_length=5000", suggested)


def test_interpolation_stretches_the_positions_and_is_the_only_scaling(configured):
    assert configured("data.seq_length=8192", "llm.rope_interpolation=2").llm.positions == 8192
    with pytest.raises(
        ConfigError, match="llm.max_positions=4096 x llm.rope_interpolation=2. Fix: .* llm.max_pos.*4097"
    ):
        configured("data.seq_length=8193", "llm.rope_interpolation=2")
    with pytest.raises(ConfigError, match="llm.rope_interpolation: got 2 with llm.rope_scaling"):
        configured("llm=llama3.1-8b", "llm.rope_interpolation=2", "dry_run=true")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/tmp/x", ".hidden", "sweep", "a\0b", "a\nb", "a\\b", "n" * 201, "é" * 101],
)
def test_a_name_stays_in_its_own_folder(name):
    limit = FileName()
    assert name not in limit
    assert limit.instead(name) in limit
    with pytest.raises(ConfigError, match="name: got "):
        check_overrides([f"name={name}"])


@pytest.mark.parametrize("name", ["a", "h72b-sft", "é", "a b", "x=1,y=2", "n" * 200, "20241127", "~a", "it's"])
def test_a_name_may_be_any_other_text(name):
    assert name in FileName()


def test_the_other_limits():
    assert "a\0b" not in FilePath() and FilePath().instead("a\0b") == "a" and "é/~" in FilePath()
    assert "see <image>" not in Text("<image>") and "see" in Text("<image>") and "<image>" in Text()
    assert "a\udcff" not in Text() and Text().instead("a\udcff") == "'\"a\"'"  # bytes that are not UTF-8
    assert "nver" not in Choice("never", "auto") and Choice("never", "auto").instead("nver") == "never"


def test_a_home_is_where_a_path_says(configured, monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    config = configured("data=jsonl", 'data.path="~/records.jsonl"', 'init.llm="~/llm"', 'data.system="~/ hello"')
    assert (config.data.source.path, config.init.llm) == ("/somebody/records.jsonl", "/somebody/llm")
    assert config.data.system == "~/ hello"  # a text, no path
