"""Communication of the distributed optimizer overlapped with forward and backward gives the same steps as without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core import dist_checkpointing

from nvlm.data.amounts import Work
from nvlm.data.loader import StepData
from nvlm.processes.groups import distributed
from nvlm.train.checkpoint.save import Checkpoints, latest
from nvlm.train.loop import build_trainer
from nvlm.train.step import train_step
from tests.dist.layouts import own_batches, prepare
from tests.dist.run import joined, run_distributed
from tests.models import small_config
from tests.stories import ONE, TEXT, TWO

# Micro-batches of two replicas: each has an image in turn, so that the last one of a replica has none, or all.
STEPS = (
    (((ONE,),), ((TEXT,),), ((TEXT,),), ((TWO,),)),
    (((TEXT,),), ((TEXT,),), ((TWO,),), ((TEXT,),)),
    (((TEXT,),), ((TEXT,),), ((TEXT,),), ((TEXT,),)),
    (((ONE,),), ((TWO,),), ((ONE,),), ((TEXT,),)),
)


def steps_in_layout(case, out) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step; the final weights go to `out`."""
    with joined(case.config) as device:
        trainer = build_trainer(case.config, device)
        results = []
        for micro_batches in STEPS:
            data = StepData(tuple(own_batches(replace(case, micro_batches=micro_batches))), 4, (), Work())
            result = train_step(trainer, data)
            results.append((result.loss, result.grad_norm))
        with Checkpoints(case.config.train, out) as checkpoints:
            checkpoints.save(trainer, len(STEPS))
        return results


SPLIT = [
    pytest.param(dict(**kind), marks=pytest.mark.slow) for kind in (dict(tensor=2, sequence=True), dict(context=2))
]


@pytest.mark.parametrize("layout", [dict(), *SPLIT], ids=str)
@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_steps_and_weights_are_those_without_overlap(arch, layout, tmp_path):
    world = 2 if not layout else 4
    with distributed(small_config().parallel, seed=0, threads=1):
        case, _ = prepare(small_config(f"arch={arch}", "llm.layers=4"), tmp_path, ())
        # Without clipping, whose factor hangs on the order in which ranks sum the gradient norm.
        case = replace(case, config=replace(case.config, optim=replace(case.config.optim, lr=1e-2, warmup=1, clip=0.0)))
        outcomes, weights = [], []
        for overlap in (False, True):
            out = tmp_path / f"overlap {overlap}"
            laid = case.laid_out(distributed_optimizer=overlap, **layout)
            outcomes.append(run_distributed(steps_in_layout, world, laid, out, timeout=240))
            weights.append(dist_checkpointing.load_plain_tensors(str(latest(out))))
    for plain, hidden in zip(*(ranks[0] for ranks in outcomes), strict=True):
        assert hidden == pytest.approx(plain, rel=1e-5)
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        if torch.is_tensor(tensor):
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
