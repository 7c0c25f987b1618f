"""Training with userbuffers, which exchange their parts by gloo (tests/engine/overlap.py), is training without them."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformer_engine.pytorch.module import base, layernorm_linear, linear

from nvlm.arch.pipeline import next_logits
from nvlm.attention.cache import generating
from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.data.loader import load_steps
from nvlm.estimate import memory
from nvlm.llm.build import frozen
from nvlm.llm.userbuffers import userbuffers
from nvlm.train.loop import build_steps, build_trainer
from nvlm.train.step import Trainer, forward, settle, train_step
from tests.dist.run import joined, run_distributed
from tests.engine.overlap import CommOverlap, CommOverlapType

SMALL = (
    "data.records=16", "data.workers=0", "train.global_batch=4", "train.micro_batch=1", "train.steps=4",
    "llm.layers=4", "llm.cross_every=2", "optim.warmup=1", "optim.lr=1e-3", "parallel.tensor=2",
    "parallel.sequence=true", "data.seq_length=512", "data.row_length=512",
)  # fmt: skip
STEPS = 3
GATHER, SCATTER = CommOverlapType.AG, CommOverlapType.RS


def train(overrides: tuple[str, ...], on: bool) -> tuple[list[tuple[float, float]], list[float], Counter, Counter]:
    """Loss and gradient norm of each step; a loss and logits of shorter rows in between; how often buffers were
    exchanged, by way; and how often Transformer Engine called on torch.distributed instead."""
    config = compose_config(*SMALL, *overrides, f"parallel.userbuffers={on}")
    length = replace(config, parallel=replace(config.parallel, userbuffers=True)).padded_length
    others = count_messages()
    with joined(config) as device, userbuffers(config):
        if on and not frozen(config):  # then two buffers are of another kind
            assert memory.userbuffers(config) == sum(buffer.whole.nbytes for buffer in base._ub_communicators.values())
        trainer = build_trainer(config, device)
        steps = build_steps(config)
        assert steps.length == (length if on else None)
        data = load_steps(replace(steps, length=length), 0, 0)
        results, evaluated = [], []
        for _ in range(STEPS):
            found = next(data)
            assert {batch.tokens.shape for batch in found.micro_batches} == {(1, length)}
            result = train_step(trainer, found)
            results.append((result.loss, result.grad_norm))
            before = CommOverlap.exchanges.copy(), others.copy()
            evaluated += evaluate(trainer, replace(steps, length=None))
            assert CommOverlap.exchanges == before[0]
            others.subtract(others - before[1])
        return results, evaluated, CommOverlap.exchanges, others


def evaluate(trainer: Trainer, steps) -> list[float]:
    """The loss of rows of another length, and some of their logits."""
    settle(trainer)
    batches = next(load_steps(steps, 0, 0)).micro_batches
    assert batches[0].tokens.shape[1] < steps.row_length
    loss = forward(trainer, batches)
    (batch,) = trainer.vision.encode([batches[0].to(trainer.device)])
    with generating(trainer.pipeline.parts):
        found = next_logits(trainer.pipeline, batch, torch.full((len(batch.tokens),), 5))
    return [loss, *([] if found is None else found[0, :4].tolist())]


def count_messages() -> Counter[str]:
    counts: Counter[str] = Counter()

    def counted(call: Callable) -> Callable:
        def count(*args, **kwargs):
            counts[call.__name__] += 1
            return call(*args, **kwargs)

        return count

    for module in (linear, layernorm_linear):
        module.gather_along_first_dim = counted(module.gather_along_first_dim)
        module.reduce_scatter_along_first_dim = counted(module.reduce_scatter_along_first_dim)
    return counts


@pytest.mark.parametrize(
    "overrides",
    [
        ("arch=decoder", "precision=bf16"),
        ("arch=xattn", "precision=bf16", "train.recompute=full"),
        ("arch=hybrid", "precision=bf16", "train.recompute=selective"),
        ("arch=hybrid", "precision=bf16", "stage=pretrain"),
        ("arch=decoder", "precision=fp8_current"),
        ("arch=hybrid", "precision=fp8_delayed"),
        ("arch=decoder", "precision=fp8_current", "precision.edges=1", "stage=pretrain"),
        ("arch=hybrid", "precision=fp8_current", "precision.edges=1", "parallel.data=2"),
        ("arch=hybrid", "precision=bf16", "peft=lora", "stage.new=[]"),
        ("arch=decoder", "precision=fp8_current", "peft=lora", "peft.dropout=0.1"),
        ("arch=hybrid", "precision=bf16", "parallel.pipeline=2", "parallel.virtual=2"),
    ],
    ids=" ".join,
)
def test_steps_are_those_without_userbuffers(overrides):
    world = 4 if overrides[-1].startswith(("parallel.data", "parallel.virtual")) else 2
    near = 1e-3 if "fp8" in overrides[1] else 1e-4  # rounding that another processor's products may differ by
    plain, hidden = (run_distributed(train, world, overrides, on) for on in (False, True))
    for (steps, evaluated, none, others), (same, again, exchanges, left) in zip(plain, hidden):
        assert same == [pytest.approx(step, rel=near) for step in steps]
        assert again == pytest.approx(evaluated, rel=near)
        assert not none and exchanges
        assert sum(left.values()) < sum(others.values()) / 2


def refused(change: Callable) -> str:
    """What a machine is told after `change`."""
    change()
    with joined(config := compose_config(*SMALL, "precision=bf16", "parallel.userbuffers=true")):
        with pytest.raises(ConfigError) as caught, userbuffers(config):
            pass
        return str(caught.value)


def on_other_machines() -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "1"


def without_multicast() -> None:
    sys.modules["transformer_engine_torch"].device_supports_multicast = lambda: False


def with_an_older_engine() -> None:
    del sys.modules["transformer_engine.pytorch"].UserBufferQuantizationMode


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (on_other_machines, "parallel.tensor with parallel.userbuffers=true: got 2, expected a divisor of the 1 "),
        (without_multicast, "got a GPU or driver without multicast, .* export UB_SKIPMC=1"),
        (with_an_older_engine, "got an older Transformer Engine, expected 2.7 or later"),
    ],
)
def test_a_machine_that_cannot_is_told_why(change, says):
    for message in run_distributed(refused, 2, change):
        assert re.search(says, message), message


def test_every_message_of_a_decoder_layer_goes_through_a_buffer():
    """Forward: two inputs gathered and two outputs scattered by the products that use and make them. Backward: two
    gradients gathered in the same way; two inputs gathered and two gradients scattered beside other products."""
    learns, frozen = (
        run_distributed(train, 2, ("arch=decoder", "precision=bf16", f"stage={stage}"), True)[0]
        for stage in ("sft", "pretrain")
    )
    passes = learns[2][GATHER, False] // 4
    assert passes % (4 * STEPS) == 0 and passes > 0  # layers, steps
    ways = {(GATHER, False): 4, (SCATTER, False): 2, (GATHER, True): 2, (SCATTER, True): 2}
    assert learns[2] == {way: count * passes for way, count in ways.items()}
    assert frozen[2] == {(GATHER, False): 4 * passes, (SCATTER, False): 4 * passes}  # none beside a weight's gradient
    assert not +learns[3] and not +frozen[3]
