"""Every parallel layout gives the plain reference's loss and gradients (fp32).

Tolerance: 1e-5 of each tensor's largest value, all gates together (worst seen 3e-6).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvlm.config.values import cross_layers
from nvlm.processes.groups import distributed
from nvlm.train.loop import build_trainer
from nvlm.train.step import forward_backward
from tests.dist.layouts import (
    ALL,
    LAYOUTS,
    MICRO_BATCHES,
    Case,
    gradients_of,
    outcomes_of,
    own_batches,
    prepare,
    reference_gradients,
    shapes_told,
)
from tests.dist.run import joined, run_distributed
from tests.models import Twins, small_config
from tests.near import assert_gradients_near
from tests.stories import ONE, SIX, TEXT, TWO

MODELS = {
    "decoder": ("arch=decoder", "llm.qk_norm=true"),
    "xattn": ("arch=xattn",),
    "hybrid": ("arch=hybrid",),
    "hybrid-tied": ("arch=hybrid", "llm.tied=true", "arch.sees=latest"),
}
TILES = 37

pytestmark = pytest.mark.timeout(900)  # the first test of a number of processes runs all of its layouts


class Expected:
    """The reference's loss and gradients for each model, and where its weights are."""

    def __init__(self, root: Path) -> None:
        self.cases: dict[str, Case] = {}
        self.twins: dict[str, Twins] = {}
        self.loss: dict[str, float] = {}
        self.gradients: dict[str, dict] = {}
        for model, overrides in MODELS.items():
            (root / model).mkdir()
            config = small_config(*overrides, "llm.layers=4", "tiling.tag=1d")
            self.cases[model], self.twins[model] = prepare(config, root / model, MICRO_BATCHES)
            self.loss[model], self.gradients[model] = reference_gradients(self.twins[model], self.cases[model])


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Iterator[Expected]:
    threads = torch.get_num_threads()
    with distributed(small_config().parallel, seed=0, threads=1):
        yield Expected(tmp_path_factory.mktemp("models"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def outcomes(expected, tmp_path_factory):
    """What layouts.outcomes_of returns, by layout and model."""

    def cases(world: int) -> dict[tuple[str, str], Case]:
        return {
            (layout, model): expected.cases[model].laid_out(**sizes)
            for layout, sizes in LAYOUTS[world].items()
            for model in MODELS
        }

    return outcomes_of(cases, tmp_path_factory)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("world", "layout"), ALL)
def test_loss_and_gradients_equal_the_reference(world, layout, model, expected, outcomes):
    ranks, out = outcomes(world, (layout, model))
    for rank in ranks:
        assert rank.loss == pytest.approx(expected.loss[model], rel=1e-5)
        assert rank.grad_norm == pytest.approx(norm_of(expected.gradients[model]), rel=1e-5)
        assert rank.copies_differ == 0
    gradients = gradients_of(expected.twins[model], out)
    assert_gradients_near(gradients, expected.gradients[model], cancelling=1e-5)


@pytest.mark.parametrize(
    ("world", "sizes"),
    [
        (2, dict(pipeline=2)),
        (2, dict(pipeline=2, virtual=2)),
        pytest.param(4, dict(pipeline=2, tensor=2, sequence=True), marks=pytest.mark.slow),
        pytest.param(4, dict(pipeline=2, context=2, context_heads=2), marks=pytest.mark.slow),
    ],
)
def test_stages_tell_no_shapes_if_rows_have_one_length(world, sizes, expected):
    """On a GPU the host would wait for each. Without its cross-attention, a CPU's rows would have no padding."""
    rows = (((TWO,), (TEXT,)), ((ONE,), (TEXT,)), ((TEXT,), (SIX,)), ((TEXT,), (TEXT,)))
    case = replace(expected.cases["hybrid"], micro_batches=rows).laid_out(**sizes)
    ranks = run_distributed(shapes_told, world, case)
    for (_, norm, told), (_, same, none) in ranks:
        assert told > 0 and none == 0
        assert same == pytest.approx(norm, rel=1e-5)
    # Context-parallel ranks divide rows of another length elsewhere.
    loss, same = (sum(found[which][0] for found in ranks) for which in (0, 1))
    assert same == pytest.approx(loss, rel=1e-5) and loss > 0


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    """Norm of all gradients together."""
    return float(torch.stack([g.norm() for g in gradients.values()]).norm())


def sums_of_keys(case: Case) -> int:
    """How often a step sums the gradient of whole keys over tensor-parallel ranks."""
    with joined(case.config) as device:
        trainer, [batch] = build_trainer(case.config, device), own_batches(case)
        rows, keys = batch.cross_tokens.shape
        assert keys not in (rows, batch.tokens.shape[1])
        whole = [(*sizes, case.config.llm.hidden) for sizes in ((keys, rows), (keys * rows, 1))]  # rows, or one line
        summed, plain = [], torch.distributed.all_reduce

        def counted(tensor, *args, **kwargs):
            summed.append(tuple(tensor.shape) in whole)
            return plain(tensor, *args, **kwargs)

        torch.distributed.all_reduce = counted
        forward_backward(trainer, [batch])
        return sum(summed)


def test_the_gradient_of_keys_is_summed_once_for_all_layers(expected):
    case = replace(expected.cases["hybrid"], micro_batches=MICRO_BATCHES[:1])
    assert len(cross_layers(case.config)) == 2
    assert run_distributed(sums_of_keys, 2, case.laid_out(tensor=2, sequence=True)) == [1, 1]


@pytest.mark.parametrize("model", ["decoder", "xattn", "hybrid"])
@pytest.mark.parametrize(("world", "layout"), ALL)
def test_tiles_are_spread_evenly(world, layout, model, expected, outcomes):
    """Ranks of a replica (with global balance all ranks) differ by at most one encoded tile."""
    sizes = LAYOUTS[world][layout]
    encoded = [rank.encoded for rank in outcomes(world, (layout, model))[0]]
    assert sum(encoded) == TILES
    replicas = world // expected.cases[model].laid_out(**sizes).config.parallel.replica
    if replicas == 1 or sizes.get("balance") == "global":
        assert max(encoded) - min(encoded) <= 1
    else:
        assert max(encoded) - min(encoded) > 1  # the micro-batches differ: this is what global balance mends
