"""Labels and prompts: what is learned, and where an answer begins."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from nvlm.arch.registry import placement_rule
from nvlm.data.batch import IGNORE
from nvlm.data.messages import first_question
from nvlm.data.outline import build_processor
from nvlm.data.samples import encode
from nvlm.data.text.tokenizer import load_tokenizer
from tests.models import (
    Story,
    record_of,
    reference_sample,
    sample_of,
    small_config,
)
from tests.parity.twins import (
    ARCHITECTURES,
    TAGS,
)
from tests.stories import GRIDS, TWO

WORDS = (
    "seven", " 42", "<|im_end|>", "<|im_start|>assistant\n", "<tile_1>", "</Image>", "\n", " caf\u00e9",
    "<Image>", "\u4e03", "{", "<box> (0, 0), (999, 999) </box>",
)  # fmt: skip


def random_story(seed: int) -> Story:
    """One to three exchanges, maybe after a system turn, with images anywhere, even in answers."""
    rng = random.Random(seed)
    turns = [("system", "".join(rng.choices(WORDS, k=2)))] if rng.random() < 0.3 else []
    grids = []
    for _ in range(rng.randint(1, 3)):
        for role in ("user", "assistant"):
            words = rng.choices(WORDS, k=rng.randint(0, 4))
            if rng.random() < (0.5 if role == "user" else 0.15):
                words.insert(rng.randint(0, len(words)), "<image>")
                grids.append(rng.choice([*GRIDS.values()]))
            turns.append((role, "".join(words)))
    return Story(f"random-{seed}", tuple(turns), tuple(grids), rng.choice(["marks", "parts"]))


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_labels_spell_what_the_assistant_says_and_nothing_else(arch, tag):
    tokenizer = load_tokenizer("tiny")
    roomy = dict(seq_length=4096, cross_length=4096)
    config = small_config(f"arch={arch}", f"tiling.tag={tag}")
    config = replace(config, data=replace(config.data, **roomy))
    pictures = 0
    for seed in range(40):
        story = random_story(seed)
        pictures += len(story.grids)
        sample = sample_of(story, config)
        at = (sample.labels != IGNORE).nonzero().flatten()
        assert torch.equal(sample.labels[at], sample.tokens[at + 1])  # the token that comes next
        spoken: list[list[int]] = [[]]
        for token in sample.labels[at].tolist():
            assert token >= 0
            spoken[-1].append(token)
            if token == tokenizer.end:
                spoken.append([])
        assert spoken.pop() == []
        expected = [words.replace("<image>", "") for role, words in story.turns if role == "assistant"]
        assert [tokenizer.decode(ids[:-1]) for ids in spoken] == expected
        assert sample.labels.tolist() == reference_sample(story, config).labels
    assert pictures > 30


def test_generation_prompts_end_where_the_assistant_begins():
    config = small_config("arch=decoder")
    processor = build_processor(config, placement_rule(config.arch.name))
    whole, prompt = (
        encode(record_of(TWO), processor),
        encode(first_question(record_of(TWO))[0], processor, generate=True),
    )
    assert torch.equal(prompt.tokens, whole.tokens[: len(prompt.tokens)])
    first = (whole.labels != IGNORE).nonzero()[0].item()
    assert len(prompt.tokens) == first + 1 and (prompt.labels == IGNORE).all()
