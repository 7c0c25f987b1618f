"""Learning rates of single module groups, read from the optimizers' own groups, and their schedule over steps."""

from __future__ import annotations

import pytest

from nvlm.arch.groups import parameter_group
from nvlm.commands.compose import compose_config
from nvlm.train.loop import build_trainer
from nvlm.train.optim import peak_rates
from tests.dist.run import joined, run_distributed

SMALL = (
    "arch=hybrid", "llm.layers=2", "llm.cross_every=1", "precision=fp32", "optim.lr=1e-3", "optim.min_lr=1e-4",
    "optim.warmup=2", "optim.weight_decay=0.1", "train.steps=10", "optim.lr_of={xattn: 2e-4, llm: 1e-5}",
)  # fmt: skip
EXPECTED = {"projector": 1e-3, "xattn": 2e-4, "llm": 1e-5}


def rates(overrides: tuple[str, ...]) -> tuple[dict, list[dict[str, set[float]]]]:
    """What the table before the first step says; and in the steps, the rate and weight decay of every weight here."""
    config = compose_config(*SMALL, *overrides)
    with joined(config) as device:
        trainer, seen = build_trainer(config, device), []
        [part] = trainer.optimizer.chained_optimizers
        named = {p: n for c in trainer.chunks for n, p in c.module.named_parameters()}
        for _ in range(11):
            found: dict[tuple, set] = {}
            for group in part.optimizer.param_groups:
                for weight in group["params"]:
                    # Without the distributed optimizer, in fp32, the optimizer has the model's own weights.
                    key = parameter_group(named[weight]), weight.dim() == 1
                    found.setdefault(key, set()).add((group["lr"], group["weight_decay"]))
            seen.append(found)
            trainer.schedule.step(increment=1)
        return peak_rates(trainer.chunks, trainer.optimizer), seen


def test_each_group_follows_the_curve_at_its_own_height():
    [(table, steps)] = run_distributed(rates, 1, ("parallel.distributed_optimizer=false",))
    assert table == EXPECTED
    for step, share in ((0, 0), (1, 0.5), (2, 1), (10, 0.1)):  # warm-up over two steps, then down to min_lr / lr
        for (group, flat), ((rate, decay),) in steps[step].items():
            assert rate == pytest.approx(share * EXPECTED[group]), (step, group)
            assert decay == (0 if flat else 0.1)  # biases and norms have none, whatever their rate
    assert steps[0].keys() == {(group, flat) for group in EXPECTED for flat in (True, False)}


@pytest.mark.parametrize("layout", [("parallel.pipeline=2",), ("parallel.data=2", "precision=bf16")])
def test_the_table_is_that_of_all_ranks(layout):
    for table, _ in run_distributed(table_of, 2, layout):
        assert table == EXPECTED


def table_of(overrides: tuple[str, ...]) -> tuple[dict, int]:
    config = compose_config(*SMALL, "parallel.distributed_optimizer=true", *overrides)
    with joined(config) as device:
        trainer = build_trainer(config, device)
        return peak_rates(trainer.chunks, trainer.optimizer), len(trainer.chunks)
