"""Text on a command line arrives as typed, whatever Hydra's grammar makes of its characters."""

from __future__ import annotations

import pytest

from nvlm.commands.compose import check_overrides
from nvlm.commands.words import plain_words, quoted
from nvlm.config.keys import near_keys
from nvlm.config.values import ConfigError

TEXTS = [
    "é", "名前", "~x", "it's", 'say "hi"', "a=b", "a#b", "a;b", "a(b)", "(", "20241127", "007", "1e3", "1_0", "true",
    "nan", "a,b", "1,2", "Hello, world!", "[x", "range(1,3)", "\\", 'x\\"y', "a{b", "tab\tbed",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_was_typed(text):
    (config,) = check_overrides([f"data.system={text}"])
    assert config.data.system == text


def test_a_path_need_not_be_utf_8():
    (config,) = check_overrides(["data=jsonl", "data.path=\udcff.jsonl"])
    assert config.data.source.path == "\udcff.jsonl"


@pytest.mark.parametrize("text", ["é", "20241127", "1e3", "true", "a,b", "it's"])
def test_a_name_is_what_was_typed(text):
    (config,) = check_overrides([f"name={text}"])
    assert config.name == text


def test_what_hydra_understands_is_left_alone():
    words = ["seed=1,2", "arch=hybrid", "optim.lr=1e-3", "name=${arch.name}", "name='a,b'", "llm.bos=null"]
    words += ["peft.targets=[llm]", "stage.new=[projector,xattn]", "llm.rope_scaling={factor:8}"]
    assert plain_words(words) == words
    assert plain_words(["-m", "name=a,b"]) == ["-m", "name=a,b"]
    assert plain_words(plain_words(["name=é"])) == ["name=" + quoted("é")]


def test_a_sweep_over_texts_that_hydra_does_not_understand():
    configs = check_overrides(["-m", "data.path=~root/é,b#", "data=jsonl", "seed=1,2"])
    assert [(config.data.source.path, config.seed) for config in configs] == [
        ("/root/é", 1), ("/root/é", 2), ("b#", 1), ("b#", 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("foo", "'foo', expected key=value"),
        ("=x", "'=x', expected key=value"),
        ("é=1", "'é=1', expected key=value"),
        ("~optim", "omit ~optim"),
        ("optim=3", "optim: got '3', expected one of llava, paper, tiny"),
        ("data=null", "data: got 'null', expected one of "),
        ("optim=", "optim: got '', expected one of llava, paper, tiny"),
        ("+experiment=é", "Fix: +experiment=ablate_"),
        ("experiment=nvlm_h_72b_sft", "Fix: +experiment=..."),
        ("optim.lr=1;2", "optim.lr: got '1;2', expected a number"),
        ("peft.targets=[llm", "peft.targets=[llm]"),
        ("name=[x]", "name: got ['x'], expected text"),
        ("name=${foo}", "'foo' not found"),
        ("wandb.project=x", "Fix: logging.project=..."),
        ("nothing.like_it=x", "one of the keys of arch, data, evaluate, llm"),
        ("lr=1", "Fix: optim.lr=..."),
        ("seeds=1", "Fix: seed=..."),
        ("+optim.foo=1", "optim.foo: got a key that does not exist"),
    ],
)
def test_what_cannot_be_understood_is_told_in_one_line(word, says):
    with pytest.raises(ConfigError) as caught:
        check_overrides([word])
    assert says in str(caught.value) and "Fix: " in str(caught.value) and "\n" not in str(caught.value)


def test_only_a_near_key_is_suggested():
    known = ["stage.train_projector", "train.steps", "train.keep", "optim.lr", "seed", "tiling"]
    assert near_keys("wandb.project", known) == []
    assert near_keys("logging", known) == []
    assert near_keys("train.step", known) == ["train.steps"]
    assert near_keys("trian.steps", known) == ["train.steps"]
    assert near_keys("lr", known) == ["optim.lr"]
    assert near_keys("train.nothing_like_it", known) == ["train.steps", "train.keep"]  # all of its section
