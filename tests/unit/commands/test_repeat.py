"""A run's configuration as the command that repeats it."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from nvlm.commands.compose import check_overrides
from nvlm.commands.repeat import command

WORDS = [
    ("seed=3",),
    ("arch=xattn", "tiling.tag=2d_bbox", "optim.lr=2e-3", "train.steps=70", "init.checkpoint=runs/a b"),
    ("arch=decoder", "llm=qwen2-7b", "peft=lora", "peft.targets=[llm]", "parallel.tensor=2"),
    ("data=jsonl", "data.path=é,{x}.jsonl", "tiling.max_tiles=1", "train.threads=2"),
]


@pytest.mark.parametrize("words", WORDS)
def test_the_command_gives_the_same_configuration(words):
    (config,) = check_overrides(list(words))
    told = shlex.split(command(config))
    assert told[:2] == ["python", "launch/train.py"]
    (again,) = check_overrides(told[2:])
    assert replace(again, name="") == replace(config, name="")


def test_sources_of_a_blend_have_no_short_command(configured):
    assert command(configured("data=tiny_blend")) is None


def test_it_says_no_more_than_what_differs(configured):
    assert command(configured("arch=hybrid")) == "python launch/train.py arch=hybrid"
    assert command(configured("arch=xattn", "seed=5")) == "python launch/train.py arch=xattn seed=5"
