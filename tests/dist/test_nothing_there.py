"""No image, nothing that learns: on some ranks, on all, in turn. No hang, and exact gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nvlm.arch.base import parameter_group
from nvlm.config import StageConfig
from nvlm.parallel import distributed
from tests.dist.layouts import gradients_of, prepare, reference_gradients, run_cases
from tests.dist.run import run_distributed
from tests.dist.test_layouts import SIX
from tests.models import small_config, to_reference
from tests.parity.test_models import ONE, TEXT, assert_gradients_near

T, I, S = ((TEXT,),), ((ONE,),), ((SIX,),)  # micro-batches: text, an image, seven tiles
STEPS = {
    "text alone": (T, T, T, T),
    "text on some ranks": (I, T, I, T),  # under data 2, replica 1 never sees an image
    "in turn": (I, T, T, I),
    "seven tiles beside none": (S, T, S, T),
}
LAYOUTS = {
    2: {
        "data 2": dict(),
        "data 2, global": dict(balance="global"),
        "pipeline 2": dict(pipeline=2),
        "tensor 2": dict(tensor=2),
        "context 2": dict(context=2),
    },
    4: {
        "pipeline 2 x data 2, global": dict(pipeline=2, balance="global"),
        "data 4": dict(),
        "pipeline 4": dict(pipeline=4),
    },
}
# Under pipeline 2 NVLM-D's second stage then holds nothing that learns, NVLM-X's first stage nothing under pipeline 4.
STAGES = {
    "all learn": dict(train_projector=True, train_xattn=True, train_llm=True),
    "llm frozen": dict(train_projector=True, train_xattn=True, train_llm=False),
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


@pytest.mark.parametrize("world", LAYOUTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_exact(arch, world, models, tmp_path):
    case, twins = models[arch]
    keys = [(step, stage, layout) for step in STEPS for stage in STAGES for layout in LAYOUTS[world]]
    cases = [
        replace(case, micro_batches=STEPS[step]).laid_out(**LAYOUTS[world][layout], **STAGES[stage])
        for step, stage, layout in keys
    ]
    outs = [tmp_path / str(number) for number in range(len(cases))]
    outcomes = list(zip(*run_distributed(run_cases, world, list(zip(cases, outs)), timeout=280)))
    for (step, stage, layout), ranks, out in zip(keys, outcomes, outs):
        loss, gradients = reference_gradients(twins, replace(case, micro_batches=STEPS[step]))
        learns = mask_of(twins, StageConfig(name="", **STAGES[stage]))
        for rank in ranks:
            assert rank.loss == pytest.approx(loss, rel=1e-5), (step, stage, layout)
        assert_gradients_near(gradients_of(twins, out), {name: g * learns[name] for name, g in gradients.items()})


def mask_of(twins, stage: StageConfig) -> dict[str, torch.Tensor]:
    """1 where a parameter learns, under the reference's names."""
    named = twins.model.named_parameters()
    return to_reference(
        {name: torch.full_like(p, parameter_group(name) in stage.trainable) for name, p in named}, twins.config
    )
