"""Gradients travel between replicas in bf16 and are added up in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nvlm.commands.compose import compose_config
from nvlm.config.compute import ParallelConfig
from nvlm.train import optim, reduce
from tests.dist.checkpoints import SMALL, built, saved, tensors_in
from tests.dist.run import joined, run_distributed

RUN = (*SMALL, "precision=bf16", "arch=hybrid", "parallel.distributed_optimizer=true", "optim.clip=0")


def gradients_of(rank: int) -> torch.Tensor:
    """Two shards of 1001 numbers; no two ranks' are alike."""
    return torch.randn(2002, generator=torch.Generator().manual_seed(rank))


def sums(width: int) -> tuple[torch.Tensor, int]:
    """This rank's gradients after the sum, in messages of `width` numbers to each rank; how many were sent."""
    with joined(compose_config(*SMALL)):
        reduce.PIECE, sent = 2 * width, []
        plain = dist.all_to_all_single

        def counted(received, piece, **kwargs):
            sent.append(piece.dtype)
            return plain(received, piece, **kwargs)

        dist.all_to_all_single = counted
        gradients = gradients_of(dist.get_rank())
        pieces = reduce.Pieces()
        pieces.send(gradients, dist.group.WORLD)
        pieces.wait()
        assert set(sent) == {torch.bfloat16}
        return gradients, len(sent)


@pytest.mark.parametrize(("width", "messages"), [(2000, 1), (300, 4)])
def test_each_rank_has_the_fp32_sum_of_rounded_gradients_in_its_shard(width, messages):
    rounded = sum(gradients_of(rank).bfloat16().float() for rank in range(2))
    for rank, (got, sent) in enumerate(run_distributed(sums, 2, width)):
        assert sent == messages
        shards, before = got.chunk(2), gradients_of(rank).chunk(2)
        assert torch.equal(shards[rank], rounded.chunk(2)[rank])  # adding them in bf16 would round once more
        assert torch.equal(shards[1 - rank], before[1 - rank])


def steps(gradients: str, bucket: int, out: Path, overlap: bool = True) -> tuple[list[tuple[float, float]], int]:
    """Loss and norm of three steps; Adam's state after the first goes to `out`. The number of groups that gradients
    travel in. Without `overlap`, they travel after the backward pass, as with pipeline stages."""
    with joined(compose_config(*RUN)) as device:
        optim.BUCKET, ParallelConfig.overlap = bucket, overlap
        trainer, step = built((*RUN, f"parallel.gradients={gradients}"), device)
        first = step()
        saved(trainer, RUN, out, 1)
        return [first, step(), step()], len(trainer.chunks[0].bucket_groups)


def means(run: Path) -> dict[str, torch.Tensor]:
    """Adam's mean gradients after the first step: a tenth of its gradients."""
    found = tensors_in(run / "checkpoints" / "step_1")
    return {name: tensor for name, tensor in found.items() if name.startswith("optimizer.state.exp_avg.")}


def test_two_replicas_make_the_steps_of_fp32_within_one_rounding(tmp_path):
    [exact, _], _ = run_distributed(steps, 2, "fp32", reduce.BUCKET, tmp_path / "fp32")
    [sent, groups], _ = run_distributed(steps, 2, "bf16", 20_000, tmp_path / "bf16")
    assert groups > 3
    assert sent[0] == pytest.approx(exact[0], rel=1e-3)
    assert sent[2] == pytest.approx(exact[2], rel=1e-2)
    run_distributed(steps, 2, "bf16", reduce.BUCKET, tmp_path / "after", False)
    expected, got, after = (means(tmp_path / name) for name in ("fp32", "bf16", "after"))
    assert expected.keys() == got.keys()
    for name, mean in expected.items():
        assert torch.equal(after[name], got[name])
        assert 0 < (got[name] - mean).norm() <= 2**-8 * mean.norm(), name


def in_turn(out: Path) -> list:
    return [steps(gradients, reduce.BUCKET, out / gradients)[0] for gradients in ("fp32", "bf16")]


def test_one_replica_keeps_every_bit(tmp_path):
    [[exact, kept]] = run_distributed(in_turn, 1, tmp_path)
    assert kept == exact
