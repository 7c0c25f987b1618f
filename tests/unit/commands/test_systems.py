"""The recipes of VILA, LLaVA-NeXT and LLaVA-OneVision: parameters counted by hand, the papers' numbers, their order."""

from __future__ import annotations

from math import ceil

import pytest

from nvlm.commands.compose import CONF, check_overrides
from nvlm.commands.dryrun import dry_run
from nvlm.commands.stages import check_sequence, stages_of
from nvlm.config.values import ConfigError
from nvlm.estimate.parameters import parameters
from nvlm.inputs.check import check_parent

ALL = {"vision", "projector", "llm"}
# Weights and biases, by hand: patches and positions, then layers of attention, MLP and two norms.
SIGLIP = (3 * 14**2 * 1152 + 1152) + 729 * 1152 + 26 * (4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152)
CLIP = (
    (3 * 14**2 * 1024 + 1024) + 577 * 1024 + 2 * 1024 + 23 * (4 * (1024**2 + 1024) + 8 * 1024**2 + 5 * 1024 + 4 * 1024)
)


def qwen2(layers: int, hidden: int, kv: int, ffn: int, vocab: int, tables: int = 2) -> int:
    """Embedding and output layer, then layers of attention with biases of queries, keys and values, MLP and norms."""
    attention = 2 * hidden**2 + 2 * hidden * kv + hidden + 2 * kv
    return tables * vocab * hidden + hidden + layers * (attention + 3 * hidden * ffn + 2 * hidden)


LLAMA = 2 * 32000 * 4096 + 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
LLMS = {
    "0.5b": qwen2(24, 896, 128, 4864, 151936, tables=1),
    "7b": qwen2(28, 3584, 512, 18944, 152064),
    "72b": qwen2(80, 8192, 1024, 29568, 152064),
}
HIDDEN = {"0.5b": 896, "7b": 3584, "72b": 8192}


def mlp(inputs: int, hidden: int) -> int:
    return inputs * hidden + hidden + hidden**2 + hidden


def numbers(config) -> tuple:
    o, t = config.optim, config.train
    return o.lr, o.lr_of.vision, t.global_batch, t.steps, config.data.seq_length, config.tiling.max_tiles


# lr, lr of the encoder, samples a step, steps, tokens, tiles; groups that learn
STAGES = {
    "1": ((1e-3, None, 512, ceil(558_128 / 512), 32768, 1), {"projector"}),
    "1.5": ((1e-5, 2e-6, 256, 4_000_000 // 256, 32768, 4), ALL),
    "2si": ((1e-5, 2e-6, 256, 3_200_000 // 256, 32768, 36), ALL),
    "2ov": ((1e-5, 2e-6, 256, 1_600_000 // 256, 32768, 36), ALL),
}


@pytest.mark.parametrize("size", LLMS)
@pytest.mark.parametrize("stage", STAGES)
def test_onevision(configured, stage, size):
    config = configured(f"+experiment=llava_ov_{stage}_{size}", "dry_run=true")
    expected, learns = STAGES[stage]
    if size == "0.5b" and stage != "1":  # a batch twice as large
        expected = (*expected[:2], 512, ceil(expected[3] / 2), *expected[4:])
    assert numbers(config) == expected
    assert (config.optim.warmup, config.optim.weight_decay) == (ceil(0.03 * config.train.steps), 0)
    counts = parameters(config)
    row_end = HIDDEN[size] if config.row_ends else 0
    assert counts["vision"].all == SIGLIP == 397_745_440
    assert counts["projector"].all == mlp(1152, HIDDEN[size]) + row_end
    assert counts["llm"].all == LLMS[size]
    assert {group for group, count in counts.items() if count.learning} == learns


def test_onevision_7b_has_8_billion(configured):
    """The paper's table 1 rounds to 8.0 billion, and names 20.0 million for a projector that has 17.0."""
    counts = parameters(configured("+experiment=llava_ov_2ov_7b", "dry_run=true"))
    assert counts["projector"].all - 3584 == 16_980_992 and counts["llm"].all == 7_615_616_512
    assert sum(count.learning for count in counts.values()) == 8_030_346_528


OTHERS = {  # as above; then parameters of encoder, projector and language model
    "vila_align_7b": ((1e-3, None, 256, 2326, 2048, 1), {"projector"}, (CLIP, 4_198_400, LLAMA)),
    "vila_pretrain_7b": ((5e-5, None, 1024, 30400, 4096, 1), {"projector", "llm"}, (CLIP, 4_198_400, LLAMA)),
    "vila_sft_7b": ((2e-5, None, 128, 16000, 4096, 1), {"projector", "llm"}, (CLIP, 4_198_400, LLAMA)),
    "llava_next_align_7b": ((1e-3, None, 256, 2181, 2048, 1), {"projector"}, (CLIP, mlp(1024, 4096), LLAMA)),
    "llava_next_sft_7b": ((1e-5, 2e-6, 128, 5938, 4096, 4), ALL, (CLIP, mlp(1024, 4096) + 4096, LLAMA)),
    "llava_next_video_7b": ((1e-5, 2e-6, 128, 6720, 8192, 4), ALL, (CLIP, mlp(1024, 4096) + 4096, LLAMA)),
    "llava_next_interleave_7b": (
        (1e-5, 2e-6, 256, 4600, 32768, 4), ALL, (SIGLIP, mlp(1152, 4096) + 4096, qwen2(32, 4096, 4096, 11008, 151936)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_vila_and_llava_next(configured, name):
    config = configured(f"+experiment={name}", "dry_run=true")
    expected, learns, sizes = OTHERS[name]
    counts = parameters(config)
    assert numbers(config) == expected
    assert tuple(counts[group].all for group in ("vision", "projector", "llm")) == sizes
    assert {group for group, count in counts.items() if count.learning} == learns
    assert config.optim.warmup == ceil(0.03 * config.train.steps)


def test_a_dry_run_shows_what_a_stage_trains(configured, capsys):
    dry_run(configured("+experiment=llava_ov_1.5_7b", "dry_run=true"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "llm │ 7,615,616,512 │ trainable" in printed and "8,030,346,528 trainable" in printed
    assert "729 a tile" in printed and "= 4,000,000 samples of at most 32,768 tokens" in printed


PIPELINES = sorted(path.stem for path in (CONF / "pipeline").glob("*.yaml") if "nvlm" not in path.stem)


@pytest.mark.parametrize("name", PIPELINES)
def test_stages_continue_their_parents(name):
    stages = stages_of([f"+pipeline={name}", "dry_run=true"])
    configs = [config for stage in stages for config in check_overrides(list(stage.words))]
    check_sequence(stages, configs)
    if name == "tiny_two_stage":  # NVLM's stages do not name their parents
        return
    first = 1 if name.startswith("tiny") else 0  # the tiny ones make a language model first
    assert all(config.stage.parent for config in configs[first + 1 :]) and not configs[first].stage.parent
    with pytest.raises(ConfigError, match="stage.recipe: got a run of"):
        check_parent(configs[first + 1], configs[-1], "init.checkpoint=RUN")
