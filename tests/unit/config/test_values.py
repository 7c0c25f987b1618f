"""Composition and rules across fields: presets, recipes, and one plain message for each mistake."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nvlm.commands.compose import check_overrides
from nvlm.config.rules import check_world
from nvlm.config.values import ConfigError, cross_layers
from nvlm.estimate.lengths import most_image_tokens

BUFFERED = ("parallel.userbuffers=true", "parallel.tensor=2", "parallel.sequence=true")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["optim.lrr=1"], ("optim.lrr", "optim.lr")),
        (["arch=hybird"], ("arch", "'hybird'", "decoder, hybrid, xattn", "arch=hybrid")),
        (["llm=qwen2-70b"], ("llm", "'qwen2-70b'", "qwen2-72b")),
        (["parallel.tensor=3"], ("parallel.tensor", "3", "llm.heads=4", "parallel.tensor=2")),
        (["llm=qwen2-7b", "dry_run=true", "parallel.tensor=8"], ("llm.heads=28", "parallel.tensor=4")),
        (
            ["arch=decoder", "data.seq_length=100"],
            ("data.seq_length", "100", "arch=decoder", "data.seq_length="),
        ),
        (["llm.chat=chatMl"], ("llm.chat", "'chatMl'", "chatml, llama3, vicuna, mistral, mistral_v1, plain, template")),
        (
            ["arch=decoder", "data.tokenize=joined", "llm.chat=llama3"],
            ("data.tokenize", "joined with llm.chat=llama3", "data.tokenize=apart"),
        ),
        (["llm.chat=plain"], ("data.questions", "4", "1 with llm.chat=plain", "data.questions=1")),
        (["data.cross_length=10"], ("data.cross_length", "10", "data.cross_length=")),
        (["tiling.tag=3d"], ("tiling.tag", "'3d'", "none, 1d, 2d_grid, 2d_bbox")),
        (["train.steps=many"], ("train.steps", "'many'", "a whole number")),
        (["tiling.max_tiles=0"], ("tiling.max_tiles", "0", "at least 1")),
        (["precision=fp8"], ("precision", "'fp8'", "bf16, fp32, fp8_blockwise")),
        (["data.window=0"], ("data.window", "0", "at least 1")),
        (["data=jsonl"], ("data.path", "nothing", "data.path=")),
        (["data=jsonl", "data.paht=r.jsonl"], ("data.paht", "expected one of data.path.", "data.path=")),
        (["data.path=r.jsonl"], ("data.path", "a key of data=", "data.records", "Fix: data=")),
        (["-m", "data=pages,jsonl", "data.path=r", "data.questions=1"], ("data.path", "a key of data=")),
        (
            ["parallel.context=4", "parallel.context_heads=4"],
            ("parallel.context_heads", "4", "parallel.context_heads=2"),
        ),
        (["parallel.context=3", "parallel.context_heads=2"], ("parallel.context_heads", "parallel.context=3")),
        (["parallel.virtual=2"], ("parallel.virtual", "2", "parallel.pipeline=2")),
        (["parallel.pipeline=3"], ("parallel.pipeline x virtual", "3", "llm.layers")),
        (["vision.balance=all"], ("vision.balance", "'all'", "replica, global")),
        (["vision.patch=13"], ("vision.tile_size", "112", "vision.patch=13", "vision.tile_size=104")),
        (["vision.tile_size=126"], ("patches per side of a tile", "9", "vision.downsample=2", "vision.pads=true")),
        (["pooling=average", "vision.downsample=9"], ("vision.downsample", "9", "8 x 8", "vision.downsample=8")),
        (["pooling=concat_3x3", "vision.pool=max"], ("vision.pads", "vision.pool=max", "vision.pads=false")),
        (["pooling=avg"], ("pooling", "'avg'", "average, bilinear", "pooling=average")),
        (["vision=clip-l-336", "vision.qk_norm=true"], ("vision.qk_norm", "expected false", "vision.qk_norm=false")),
        (
            ["stage.train_projector=false", "stage.train_xattn=false", "stage.train_llm=false"],
            ("stage", "nothing"),
        ),
        (["arch=xattn", "arch.bind_tags=mean"], ("arch.bind_tags", "none for arch=xattn", "arch=hybrid")),
        (["arch=decoder", "arch.sees=latest"], ("arch.sees", "before for arch=decoder", "arch=xattn")),
        (["arch.sees=last"], ("arch.sees", "'last'", "before, latest")),
        (["optim.warmup=100000"], ("optim.warmup", "100000")),
        (["peft=lroa"], ("peft", "'lroa'", "peft=lora")),
        (["peft=lora", "peft.rank=0"], ("peft.rank", "0", "at least 1")),
        (["peft=lora", "peft.dropout=1.0"], ("peft.dropout", "1.0", "below 1")),
        (["peft=lora", "peft.targets=[llm,vision]"], ("peft.targets", "'vision'", "llm, xattn")),
        (["peft=lora", "peft.targets=llm"], ("peft.targets", "'llm'", "a list", "peft.targets=[llm]")),
        (["peft=lora", "stage=pretrain", "stage.new=[]", "peft.targets=[llm]"], ("peft.targets=[xattn]",)),
        (["peft=lora", "stage=pretrain", "arch=decoder"], ("peft.targets", "learn in full", "peft=none", "stage=sft")),
        (["peft=lora", "stage=pretrain", "arch=xattn"], ("peft.targets", "learn in full", "peft=none", "stage=sft")),
        (["peft=lora", "arch=xattn", "peft.targets=[xattn]"], ("peft.targets", "declare new (llm)")),
        (["peft=lora", "peft.targets=[]"], ("peft.targets", "[]", "(llm)", "peft.targets=[llm]")),
        (["precision=fp8_delayed", "precision.edges=1"], ("precision.edges", "all layers or none", "fp8_current")),
        (["precision=fp8_current", "precision.edges=2"], ("precision.edges", "fewer than half of llm.layers=4")),
        (["precision=bf16", "precision.param_gather=true"], ("precision.param_gather", "nothing without FP8", "mxfp8")),
        (
            ["precision=fp8_current", "precision.param_gather=true"],
            ("precision.param_gather", "parallel.distributed_optimizer=true"),
        ),
        (
            ["precision=mxfp8", "precision.param_gather=true", "parallel.distributed_optimizer=true"],
            ("precision.param_gather", "fp8_delayed, fp8_current or fp8_blockwise"),
        ),
        (["precision=bf16", "precision.edges=1"], ("precision.edges", "nothing without FP8", "mxfp8")),
        (["precision=bf16", "precision.encoder=true"], ("precision.encoder", "nothing without FP8")),
        (["precision=fp8_blockwise"], ("llm.kv_heads", "64", "a multiple of 128", "precision=bf16")),
        ([*BUFFERED[:1]], ("parallel.userbuffers=true", "parallel.sequence=false", "parallel.sequence=true, or")),
        ([*BUFFERED, "precision=fp32"], ("precision=fp32", "bf16, fp8_current, fp8_delayed", "userbuffers=false")),
        ([*BUFFERED, "precision=mxfp8"], ("precision=mxfp8", "bf16, fp8_current, fp8_delayed")),
        ([*BUFFERED, "precision=bf16"], ("train.micro_batch", "data.row_length=", "train.micro_batch=1")),
        (
            [*BUFFERED, "precision=bf16", "train.micro_batch=1"],
            ("data.row_length", "data.seq_length=512", "data.row_length=512"),
        ),
        (["train.offload=true", "train.recompute=full"], ("train.offload", "train.recompute=none")),
        (["train.offload=true", "parallel.pipeline=2"], ("train.offload", "parallel.pipeline=1")),
        (["train.recompute=some"], ("train.recompute", "'some'", "none, selective, full")),
        (["not an override"], ("command line",)),
        (["arch=hybrid,decodr"], ("arch", "'decodr'", "decoder")),
    ],
)
def test_a_mistake_says_what_got_expected_and_fix(arguments, says):
    with pytest.raises(ConfigError) as caught:
        check_overrides(arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert "Fix: " in message
    for words in says:
        assert words in message, message


@pytest.mark.parametrize(
    ("typed", "now"),
    [
        ("llm.seq_length.decoder=640", "data.seq_length"),
        ("llm.cross_length.hybrid=9", "data.cross_length"),
        ("llm.steps={decoder:1,xattn:1,hybrid:1}", "train.steps"),
    ],
)
def test_a_key_of_an_earlier_version_is_answered_with_the_one_that_took_its_place(typed, now):
    with pytest.raises(ConfigError) as caught:
        check_overrides([typed])
    key = typed.partition("=")[0]
    assert str(caught.value) == f"{key}: got a key that does not exist, expected one of {now}. Fix: {now}=..."


@pytest.mark.parametrize(
    ("llm", "arch", "expected"),
    [
        ("tiny", "decoder", (512, 0, 900)),
        ("tiny", "xattn", (512, 256, 900)),
        ("tiny", "hybrid", (512, 256, 700)),
        ("yi-34b", "decoder", (3200, 0, 40_000)),
        ("qwen2-72b", "xattn", (1024, 1792, 20_000)),
        ("llama3.1-8b", "hybrid", (1280, 1566, 40_000)),
    ],
)
def test_lengths_follow_the_language_model_and_the_architecture_unless_typed(configured, llm, arch, expected):
    words = (f"llm={llm}", f"arch={arch}", "dry_run=true")
    for data in ("pages", "jsonl"):
        config = configured(*words, f"data={data}")
        assert (config.data.seq_length, config.data.cross_length, config.train.steps) == expected
    config = configured(*words, "data.seq_length=4000", "data.cross_length=4000", "train.steps=4000")
    assert (config.data.seq_length, config.data.cross_length, config.train.steps) == (4000, 4000, 4000)
    assert configured(*words, "data=jsonl").data.row_length == expected[0]


def test_a_key_of_another_data_source_is_left_out_and_told(capsys):
    (config,) = check_overrides(["data.records=48", "data=jsonl", "data.path=r.jsonl", "data.window=3"])
    assert (config.data.source.path, config.data.window) == ("r.jsonl", 3)
    assert capsys.readouterr().err == "data.records=48: ignored, data=jsonl does not have it\n"


def test_right_overrides_pass():
    check_overrides(["-m", "arch=decoder,xattn,hybrid", "tiling.tag=none,1d,2d_grid,2d_bbox"])


def test_configuration_is_checked_without_torch():
    code = (
        "import sys; from nvlm.commands.compose import check_overrides; check_overrides(['arch=xattn']);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_big_llm_chooses_the_big_encoder_unless_told_otherwise(configured):
    assert configured("llm=qwen2-72b", "dry_run=true").vision.name == "internvit-6b"
    assert configured("llm=yi-34b", "vision=tiny", "dry_run=true").vision.name == "tiny"
    assert configured().vision.name == "tiny"


def test_ten_cross_attention_layers_at_both_sizes(configured):
    assert cross_layers(configured("llm=qwen2-72b", "dry_run=true")) == tuple(range(8, 81, 8))
    assert cross_layers(configured("llm=yi-34b", "arch=xattn", "dry_run=true")) == tuple(range(6, 61, 6))
    assert cross_layers(configured("llm=yi-34b", "arch=decoder", "dry_run=true")) == ()


@pytest.mark.parametrize(
    ("arch", "stream", "cross"), [("decoder", 1827, 0), ("xattn", 35, 1792), ("hybrid", 261, 1566)]
)
def test_most_tokens_of_an_image_at_full_size(configured, arch, stream, cross):
    config = configured("llm=qwen2-72b", f"arch={arch}", "dry_run=true")
    assert most_image_tokens(config) == (stream, cross)


# NVLM Tables 10 and 11: lr, min lr, warm-up, beta2, weight decay, clip, batch, text tokens, tiles, steps, pipeline.
TABLES = {
    ("d", "pretrain", ""): (1e-4, 2.5e-5, 500, 0.95, 0.1, 10, 2048, 512, 1, 20_000, 1),
    ("x", "pretrain", ""): (1e-4, 1e-5, 1000, 0.95, 0.05, 1, 2048, 512, 1, 20_000, 1),
    ("h", "pretrain", ""): (1e-4, 1e-5, 1000, 0.98, 0.05, 1, 2048, 512, 6, 20_000, 1),
    ("d", "sft", ""): (2e-6, 2.5e-7, 1000, 0.98, 0.1, 10, 128, 3200, 6, 40_000, 4),
    ("x", "sft", "34b"): (1e-5, 1e-6, 500, 0.98, 0.05, 1, 512, 1024, 6, 20_000, 1),
    # The paper has one pipeline stage here, too; on GPUs of 80 GB, rows of four samples need two.
    ("x", "sft", "72b"): (1e-5, 1e-7, 500, 0.98, 0.05, 1, 256, 1024, 6, 20_000, 2),
    ("h", "sft", "34b"): (1e-5, 1e-7, 1000, 0.98, 0.05, 1, 256, 1280, 6, 40_000, 1),
    ("h", "sft", "72b"): (1e-5, 1e-7, 1000, 0.98, 0.05, 1, 256, 1280, 6, 40_000, 2),
}
LEARNS = {
    ("d", "pretrain"): {"projector"},
    ("x", "pretrain"): {"projector", "xattn"},
    ("h", "pretrain"): {"projector", "xattn"},
    ("d", "sft"): {"projector", "llm"},
    ("x", "sft"): {"projector", "xattn", "llm"},
    ("h", "sft"): {"projector", "xattn", "llm"},
}


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("size", ["34b", "72b"])
@pytest.mark.parametrize("letter", ["d", "x", "h"])
def test_recipes_are_the_papers(configured, letter, size, stage):
    config = configured(f"+experiment=nvlm_{letter}_{size}_{stage}", "dry_run=true")
    expected = TABLES.get((letter, stage, size)) or TABLES[letter, stage, ""]
    o, t, p = config.optim, config.train, config.parallel
    got = (
        o.lr, o.min_lr, o.warmup, o.beta2, o.weight_decay, o.clip,
        t.global_batch, config.data.seq_length, config.tiling.max_tiles, t.steps, p.pipeline,
    )  # fmt: skip
    assert got == pytest.approx(expected, rel=0)
    assert (o.beta1, p.tensor, config.llm.name) == (0.9, 8, {"34b": "yi-34b", "72b": "qwen2-72b"}[size])
    assert config.tiling.tag == ("none" if expected[8] == 1 else "1d")
    groups = set(config.stage.trainable) - ({"xattn"} if letter == "d" else set())
    assert groups == LEARNS[letter, stage]


def test_processes_must_fill_whole_replicas_and_share_the_batch(configured):
    config = configured("llm=qwen2-72b", "dry_run=true")
    assert check_world(config, 64) == 8
    with pytest.raises(ConfigError, match="multiple of 8"):
        check_world(config, 12)
    with pytest.raises(ConfigError, match="global_batch"):
        check_world(configured("train.global_batch=3", "dry_run=true"), 2)
