"""The numbers that a step reports over several ranks: sums over replicas, and how many tiles each rank encoded."""

from __future__ import annotations

import pytest

from nvlm.commands.compose import compose_config
from nvlm.data.amounts import Work
from nvlm.data.loader import load_steps
from nvlm.processes import groups
from nvlm.train.loop import build_steps, build_trainer
from nvlm.train.step import train_step
from nvlm.vision.path import VisionPath
from nvlm.vision.prepass import shares
from tests.dist.run import joined, run_distributed

DATA = ("data.workers=0", "data.records=64", "train.global_batch=6", "train.micro_batch=2", "data.row_length=600")


def one_step(overrides):
    """The step's result, this replica's own work, and the tiles that this rank encoded."""
    config, encoded, features = compose_config(*DATA, *overrides), [], VisionPath.features

    def counted(path, pixels, *tokens):
        encoded.append(len(pixels))
        return features(path, pixels, *tokens)

    with joined(config) as device:
        VisionPath.features = counted
        try:
            trainer = build_trainer(config, device)
            data = next(load_steps(build_steps(config), 0, 0))
            result = train_step(trainer, data)
            return result, data.work, sum(encoded), groups.data_rank()[0]
        finally:
            VisionPath.features = features


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.data=2",),
        ("parallel.data=2", "vision.balance=global"),
        ("parallel.tensor=2",),
        ("parallel.pipeline=2", "llm.layers=4"),
    ],
    ids=" ".join,
)
def test_counts_are_summed_over_replicas_and_told_alike_on_all_ranks(layout):
    results, works, encoded, replicas = zip(*run_distributed(one_step, 2, layout))
    config, first = compose_config(*DATA, *layout), results[0]
    own = {replica: work for replica, work in zip(replicas, works)}
    assert all(result.work == first.work for result in results)
    assert first.work == sum(own.values(), Work())
    assert first.tiles_by_replica == tuple(own[replica].tiles for replica in sorted(own))
    assert first.work.pairs > first.work.tokens > 0 and first.work.cross_pairs > 0
    assert first.positions >= first.work.tokens and first.key_positions >= first.work.keys
    told = shares(first.tiles_by_replica, config.parallel.replica, config.vision.balance)
    assert sorted(told) == sorted(encoded) and sum(encoded) == first.work.tiles
