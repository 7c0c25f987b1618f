"""An encoder that learns: loss and all gradients equal the plain reference's, whose encoder learns too.

Tolerance: as in test_layouts. Gradients of the encoder: 1e-5 of each tensor's largest value.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nvlm.commands.compose import compose_config
from nvlm.data.loader import load_steps
from nvlm.processes.groups import distributed
from nvlm.train.loop import build_steps, build_trainer
from nvlm.train.step import train_step
from tests.dist.layouts import (
    MICRO_BATCHES,
    encoder_gradients_of,
    gradients_of,
    prepare,
    reference_gradients,
    run_cases,
)
from tests.dist.run import joined, run_distributed
from tests.models import small_config
from tests.near import assert_gradients_near
from tests.stories import ONE, SIX, TEXT

ARCHITECTURES = ("decoder", "xattn", "hybrid")
T, P, S = ((TEXT,),), ((ONE,),), ((SIX,),)  # micro-batches: text, a picture, seven tiles
STEPS = {"all": MICRO_BATCHES, "text alone": (T, T, T, T), "on some ranks": (P, T, S, T)}
SHARDED = dict(distributed_optimizer=True)
FEW = [  # of each kind of gradients that return: whole on several ranks, in parts, from other replicas
    ("decoder", "all", dict(tensor=2, sequence=True)),
    ("hybrid", "on some ranks", dict(pipeline=2, virtual=2) | SHARDED),
    ("xattn", "all", dict(balance="global", train_llm=False, tiles_per_backward=3) | SHARDED),
]
LAYOUTS = {
    1: [dict(), dict(recompute="full")],
    2: [
        *(dict(tensor=2), dict(tensor=2, sequence=True), dict(pipeline=2), dict(pipeline=2, virtual=2)),
        *(dict(context=2), dict(context=2, context_heads=2), dict(), dict(balance="global")),
    ],
    4: [
        *(dict(tensor=2, sequence=True, pipeline=2), dict(tensor=2, pipeline=2, virtual=2), dict(pipeline=4)),
        *(dict(tensor=2, sequence=True, context=2), dict(pipeline=2), dict(pipeline=2, context=2, context_heads=2)),
        *(dict(pipeline=2, virtual=2, balance="global"), dict(context=4, context_heads=2), dict(balance="global")),
        dict(tensor=2, balance="global"),
    ],
    8: [
        dict(tensor=2, sequence=True, pipeline=2, context=2),
        dict(tensor=2, pipeline=2, balance="global"),
    ],
}
STAGES = [
    dict(),
    dict(train_llm=False),
    dict(train_llm=False, train_projector=False),
    dict(train_llm=False, train_projector=False, train_xattn=False),
]

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Iterator[dict]:
    threads = torch.get_num_threads()
    with distributed(small_config().parallel, seed=0, threads=1):
        root, made = tmp_path_factory.mktemp("models"), {}
        for arch in ARCHITECTURES:
            (root / arch).mkdir()
            case, twins = prepare(small_config(f"arch={arch}", "llm.layers=4"), root / arch, ())
            twins.reference.vision_model.requires_grad_(True)
            made[arch] = case, twins
        yield made
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(models):
    """A function from (architecture, step) to the reference's loss and gradients."""
    done: dict = {}

    def of(arch: str, step: str):
        if (arch, step) not in done:
            case, twins = models[arch]
            done[arch, step] = reference_gradients(twins, replace(case, micro_batches=STEPS[step]))
        return done[arch, step]

    return of


def check(world: int, cases: list[tuple[str, str, dict]], models, expected, root) -> None:
    """Run `cases` of (architecture, step, settings) on `world` processes and compare them."""
    made = [
        replace(models[arch][0], micro_batches=STEPS[step]).laid_out(train_vision=True, **settings)
        for arch, step, settings in cases
    ]
    outs = [root / str(number) for number in range(len(cases))]
    outcomes = list(zip(*run_distributed(run_cases, world, list(zip(made, outs)), timeout=800)))
    for (arch, step, settings), case, ranks, out in zip(cases, made, outcomes, outs, strict=True):
        loss, gradients = expected(arch, step)
        twins, stage = models[arch][1], case.config.stage
        learns = {"language_model": stage.train_llm, "mlp1": stage.train_projector, "vision_model": True}
        learns |= {"cross_keys": stage.train_xattn}
        wanted = {name: g * (learns[name.partition(".")[0]] if not _gated(name) else stage.train_xattn)
                  for name, g in gradients.items()}  # fmt: skip
        norm = float(torch.stack([g.norm() for g in wanted.values()]).norm())
        for rank in ranks:
            assert rank.loss == pytest.approx(loss, rel=1e-5), (arch, step, settings)
            assert rank.grad_norm == pytest.approx(norm, rel=1e-5), (arch, step, settings)
            assert rank.copies_differ == 0
        found = gradients_of(twins, out) | encoder_gradients_of(twins, out)
        assert_gradients_near(found, wanted, cancelling=1e-5)


def _gated(name: str) -> bool:
    return "cross_attn" in name


def test_gradients_equal_the_reference_in_some_layouts(models, expected, tmp_path):
    check(2, FEW, models, expected, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("world", LAYOUTS)
def test_gradients_equal_the_reference_in_all_layouts(world, arch, models, expected, tmp_path):
    of_steps = [("all", dict()), *((step, SHARDED) for step in STEPS)]
    cases = [(arch, step, layout | more) for layout, (step, more) in itertools.product(LAYOUTS[world], of_steps)]
    cases += [(arch, "all", LAYOUTS[world][0] | stage) for stage in STAGES]
    # With the distributed optimizer, process groups and their threads outlive a case, so few share a process.
    for number, some in enumerate(itertools.batched(cases, 4)):
        (tmp_path / str(number)).mkdir()
        check(world, list(some), models, expected, tmp_path / str(number))


def after_two_steps(words: tuple[str, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The encoder's weights before and after two steps."""
    config = compose_config(*words, "stage.train_vision=true", "optim.warmup=0", "data.records=8", "data.workers=0")
    with joined(config) as device:
        trainer, data = build_trainer(config, device), iter(load_steps(build_steps(config), 0, 0))
        weights = list(trainer.vision.path.encoder.parameters())
        before = [weight.detach().clone() for weight in weights]
        for _ in range(2):
            assert train_step(trainer, next(data)).updated
        return before, [weight.detach().clone() for weight in weights]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("parallel.data=2", "vision.balance=global", "parallel.gradients=bf16", "parallel.distributed_optimizer=true"),
        ("parallel.tensor=2", "peft=lora", "train.recompute=full"),
        ("parallel.pipeline=2", "llm.layers=4", "parallel.distributed_optimizer=true", "train.micro_batch=1"),
    ],
    ids=" ".join,
)
def test_all_ranks_keep_the_same_encoder(words):
    (first, one), (_, other) = run_distributed(after_two_steps, 2, words)
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert all(not torch.equal(*pair) for pair in zip(first, one, strict=True))
