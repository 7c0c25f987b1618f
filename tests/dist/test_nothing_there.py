"""Ranks or steps without images or without anything that learns: no hang, and exact gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nvlm.arch.groups import parameter_group
from nvlm.config.values import StageConfig
from nvlm.processes.groups import distributed
from tests.dist.layouts import gradients_of, prepare, reference_gradients, run_cases
from tests.dist.run import run_distributed
from tests.models import parameters_of, small_config, to_reference
from tests.near import assert_gradients_near
from tests.stories import ONE, SIX, TEXT

T, P, S = ((TEXT,),), ((ONE,),), ((SIX,),)  # micro-batches: text, a picture, seven tiles
STEPS = {
    "text alone": (T, T, T, T),
    "text on some ranks": (P, T, P, T),  # under data 2, replica 1 never sees an image
    "in turn": (P, T, T, P),
    "seven tiles beside none": (S, T, S, T),
}
DATA, BALANCED = dict(), dict(balance="global")
PIPELINE, TENSOR, CONTEXT = dict(pipeline=2), dict(tensor=2), dict(context=2)
# Under pipeline 2 NVLM-D's second stage then holds nothing that learns, NVLM-X's first stage nothing under pipeline 4.
STAGES = {
    "all learn": dict(train_projector=True, train_xattn=True, train_llm=True),
    "llm frozen": dict(train_projector=True, train_xattn=True, train_llm=False),
}
CASES = {
    2: [
        *((step, "llm frozen", layout) for step in STEPS for layout in (DATA, BALANCED, PIPELINE)),
        *((step, "all learn", layout) for step in ("text alone", "in turn") for layout in (PIPELINE, TENSOR, CONTEXT)),
    ],
    4: [
        *((step, "llm frozen", PIPELINE | BALANCED) for step in STEPS),
        *((step, "llm frozen", layout) for step in ("text alone", "in turn") for layout in (DATA, dict(pipeline=4))),
        *(("in turn", "all learn", layout) for layout in (DATA, PIPELINE, dict(pipeline=4))),
    ],
}
ARCHITECTURES = ("decoder", "xattn", "hybrid")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Iterator[dict]:
    threads = torch.get_num_threads()
    with distributed(small_config().parallel, seed=0, threads=1):
        root = tmp_path_factory.mktemp("models")
        made = {}
        for arch in ARCHITECTURES:
            (root / arch).mkdir()
            made[arch] = prepare(small_config(f"arch={arch}", "llm.layers=4"), root / arch, ())
        yield made
    torch.set_num_threads(threads)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", ["hybrid", *(pytest.param(a, marks=pytest.mark.slow) for a in ("decoder", "xattn"))])
def test_gradients_are_exact(arch, world, models, tmp_path):
    case, twins = models[arch]
    cases = [
        replace(case, micro_batches=STEPS[step]).laid_out(**layout, **STAGES[stage])
        for step, stage, layout in CASES[world]
    ]
    outs = [tmp_path / str(number) for number in range(len(cases))]
    outcomes = list(zip(*run_distributed(run_cases, world, list(zip(cases, outs)), timeout=280)))
    expected = {
        step: reference_gradients(twins, replace(case, micro_batches=batches)) for step, batches in STEPS.items()
    }
    for (step, stage, layout), ranks, out in zip(CASES[world], outcomes, outs):
        loss, gradients = expected[step]
        learns = mask_of(twins, StageConfig(name="", new=(), **STAGES[stage]))
        for rank in ranks:
            assert rank.loss == pytest.approx(loss, rel=1e-5), (step, stage, layout)
        assert_gradients_near(gradients_of(twins, out), {name: g * learns[name] for name, g in gradients.items()})


def mask_of(twins, stage: StageConfig) -> dict[str, torch.Tensor]:
    """1 for parameters that learn, under the reference's names."""
    named = parameters_of(twins.model).items()
    return to_reference(
        {name: torch.full_like(p, parameter_group(name) in stage.trainable) for name, p in named}, twins.config
    )
