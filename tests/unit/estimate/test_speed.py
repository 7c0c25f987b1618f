"""The time of a step: products by shape, messages that show, the host, and published runs."""

from __future__ import annotations

import dataclasses

import pytest

from nvlm.config.hardware import GPUS
from nvlm.estimate.flops import model_flops
from nvlm.estimate.load import step_load
from nvlm.estimate.pace import product_share
from nvlm.estimate.speed import bubble_share, speed
from nvlm.estimate.traffic import tensor_messages

H100 = GPUS["h100"]
ONE_NODE = ("+experiment=nvlm_h_72b_sft", "dry_run=true", "parallel.pipeline=1", "parallel.virtual=1")


@pytest.mark.parametrize("keys", [(), ("parallel.pipeline=2",), ("stage=pretrain",), ("train.recompute=full",)])
def test_a_step_takes_longer_than_its_products_at_the_peak(configured, keys):
    config = configured("+experiment=nvlm_h_72b_sft", "dry_run=true", *keys)
    load = step_load(config, 4)
    found = speed(config, 4, H100, load)
    gpus = 4 * config.parallel.replica
    assert found.flops == 4 * load.micro_batches * model_flops(config, load.work).total
    assert 1.5 < found.step / (found.flops / gpus / H100.bf16) < 5
    again = speed(dataclasses.replace(config, train=dataclasses.replace(config.train, recompute="full")), 4, H100, load)
    assert again.flops == found.flops and (again.step > found.step or config.train.recompute == "full")


def test_bubble_and_traffic_are_the_schedules(configured):
    def laid(*keys):
        return configured("+experiment=nvlm_d_72b_sft", "dry_run=true", *keys)

    assert bubble_share(laid("parallel.virtual=1"), 32) == 3 / 32
    assert bubble_share(laid(), 32) == 3 / 160
    one = laid("parallel.pipeline=1", "parallel.virtual=1")
    load = step_load(one, 2)
    assert speed(one, 2, H100, load).traffic.pipeline == 0
    # One layer's four collectives of the forward, four of the backward, and two gathers for weights' gradients.
    each = 10 * 7 / 8 * load.tokens * 8192 * 2
    assert speed(one, 2, H100, load).traffic.tensor == load.micro_batches * 80 * each
    alone = laid("parallel.tensor=1", "parallel.sequence=false")
    sent = speed(alone, 1, H100, step_load(alone, 1)).traffic
    assert sent.tensor == sent.context == sent.data == 0 and sent.pipeline > 0


L70 = "llm.layers=80 llm.hidden=8192 llm.heads=64 llm.ffn=28672 parallel.tensor=4 parallel.virtual=5"
L405 = "llm.layers=128 llm.hidden=16384 llm.heads=128 llm.ffn=53248 parallel.tensor=8 parallel.virtual=8"
# TFLOP/s a GPU of Llama 3 runs on H100, rows of 8192 tokens: the Llama 3 paper in bf16 (126 layers there), and
# Megatron-Bridge's pages in FP8.
PUBLISHED = [
    (430, 8192, 2048, f"{L405} parallel.pipeline=16 parallel.gradients=fp32"),
    (400, 16384, 2048, f"{L405} parallel.pipeline=16 parallel.gradients=fp32"),
    (731, 64, 256, f"{L70} parallel.pipeline=8 precision=fp8_current"),
    (744, 8, 128, "parallel.tensor=1 parallel.sequence=false precision=fp8_current"),
    (827, 1024, 1024, f"{L405} parallel.pipeline=8 parallel.context=2 precision=fp8_current"),
]


@pytest.mark.parametrize(("published", "gpus", "batch", "keys"), PUBLISHED)
def test_published_runs_come_out(configured, published, gpus, batch, keys):
    rows = ("data.seq_length=8192", "data.row_length=8192", f"train.global_batch={batch}", "llm.vocab_multiple=128")
    config = configured("arch=decoder", "llm=llama3.1-8b", "dry_run=true", *rows, *keys.split())
    replicas = gpus // config.parallel.replica
    found = speed(config, replicas, H100, step_load(config, replicas, tiles=0))
    assert found.flops / found.step / gpus / 1e12 == pytest.approx(published, rel=0.12)


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ((128 * 11, 256 * 12, 250), 1 / 2),  # 132 tiles for 132 multiprocessors; half of the time without a long sum
        ((128 * 11, 256 * 12, 2250), 0.9),
        ((128 * 12, 256 * 12, 2250), 0.9 * 0.9 * 288 / 396),  # a second wave for 12 tiles: smaller ones fill three
        ((128, 256, 2250), 0.9 * 0.9 * 2 / 132),  # two small tiles
    ],
)
def test_a_product_is_slow_where_it_leaves_multiprocessors_idle(shape, share):
    assert product_share(*shape, 132) == pytest.approx(share)


def test_rows_of_one_short_sample_wait_for_the_host(configured):
    """The gain of the recipes' rows, and its reason."""
    for letter, samples, gain in (("x", 4, 1.4), ("h", 4, 1.3), ("d", 2, 1.05)):
        four = configured(f"+experiment=nvlm_{letter}_34b_sft", "dry_run=true", "train.global_batch=256")
        data = dataclasses.replace(
            four.data, row_length=four.data.seq_length, cross_length=four.data.cross_length // samples
        )
        one = dataclasses.replace(four, data=data)
        replicas = 128 // four.parallel.replica
        before, after = (speed(config, replicas, H100, step_load(config, replicas)) for config in (one, four))
        assert before.flops == after.flops and before.step > gain * after.step
        assert after.host == 0 and (before.host > 0) == (letter != "d")


def test_what_of_tensor_parallel_messages_shows(configured):
    def messages(*keys):
        config = configured("arch=decoder", "llm=yi-34b", "data=jsonl", "data.path=x.jsonl", *keys)
        load = step_load(config, 1)
        unit = 7 / 8 * load.tokens * config.llm.hidden * 2 * config.llm.layers
        found = tensor_messages(config, load, 0)
        return found.size / unit, found.shown / unit, found.waits / config.llm.layers

    def near(*values):
        return pytest.approx(values)

    assert messages() == near(10, 6, 6)
    assert messages("stage=pretrain") == near(8, 8, 8)  # no product of a weight's gradient that could hide a message
    assert messages("train.recompute=full") == near(14, 10, 10) and messages("train.recompute=selective") == near(
        12, 8, 8
    )
    assert messages("precision=fp8_current") == near(7, 4, 6)  # gathers travel in FP8
    assert messages("parallel.userbuffers=true") == near(10, 3, 3)
    assert messages("parallel.sequence=false") == near(8, 4, 2)


def test_latency_counts_where_messages_are_small(configured):
    config = configured("+experiment=nvlm_x_34b_sft", "dry_run=true", "data.row_length=1024", "data.cross_length=1792")
    load = step_load(config, 16)
    sent = tensor_messages(config, load, 0)
    assert sent.waits == 6 * 60 + 3 * 10 + 1  # layers, cross-attention's branch, and the gradient of the keys
    found = speed(config, 16, H100, load).tensor / load.micro_batches
    assert found == pytest.approx(sent.waits * 18e-6 + sent.shown / (0.73 * 450e9)) and found > 1.3 * sent.waits * 18e-6


def test_between_replicas_only_one_micro_batch_hides_messages(configured):
    config = configured("+experiment=nvlm_x_34b_sft", "dry_run=true", "train.global_batch=256")
    load = step_load(config, 16)
    found, apart = (speed(one, 16, H100, load) for one in (config, configured(
        "+experiment=nvlm_x_34b_sft", "dry_run=true", "train.global_batch=256", "parallel.pipeline=2")))  # fmt: skip
    sent = found.traffic.data / (0.84 * 50e9)
    assert 0 < found.data < sent and found.data > sent - found.compute / load.micro_batches * 1.5
    assert apart.data == pytest.approx(apart.traffic.data / (0.84 * 50e9))  # stages sum shared gradients first


def test_userbuffers_pad_rows(configured):
    plain, buffered = (configured(*ONE_NODE, f"parallel.userbuffers={on}") for on in ("false", "true"))
    assert step_load(buffered, 16, text=100).length == 5120 > step_load(plain, 16, text=100).length
