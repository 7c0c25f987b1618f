"""Twenty SIGKILLs at random moments of one run: no process remains, and the run ends as if undisturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.e2e.preloaded import alive, at, run, start, wait_for

STEPS = 20
SMALL = (
    "precision=fp32 data.records=48 data.workers=1 train.global_batch=2 tiling.max_tiles=2 "
    "llm.layers=1 llm.cross_every=1 train.threads=1 "
    f"optim.warmup=2 train.steps={STEPS} train.save_every=1 "
    "evaluate.questions=60 evaluate.batch=2 evaluate.max_new_tokens=8 "
    "parallel.data=2 parallel.distributed_optimizer=true name=run"
).split()
MOMENTS = ["start", "soon", *["save", "train"] * 4, "soon", *["save", "train"] * 3, "save", "evaluate", "evaluate"]


def losses(where: Path) -> list[float]:
    rows = [json.loads(line) for line in (where / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def tensors(where: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights and Adam's state."""
    checkpoints = where / "runs" / "run" / "checkpoints"
    assert (checkpoints / "latest").read_text() == f"step_{STEPS:08d}\n"
    dcp_to_torch_save(checkpoints / f"step_{STEPS:08d}", where / "whole.pt")
    state = torch.load(where / "whole.pt", weights_only=False)
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


def wait_until(moment: str, where: Path, rank: int, chance: random.Random) -> None:
    """Return at a random moment of the given kind."""
    wait_for(lambda: at(where, rank))
    if moment == "start":  # at once: how long a start takes differs between machines
        return
    if moment == "soon":
        time.sleep(chance.uniform(0, 1.5))
    elif moment == "evaluate":
        wait_for(lambda: at(where, rank).phase == "evaluate")
        time.sleep(chance.uniform(0, 0.3))
    else:
        begun = wait_for(lambda: (now := at(where, rank)) and now.step)
        target = min(begun + chance.randint(1, 2), STEPS - 1)
        phase = "save" if moment == "save" else chance.choice(["data", "forward-backward", "optimizer"])
        wait_for(lambda: (now := at(where, rank)) and (now.step > target or (now.step, now.phase) == (target, phase)))
        time.sleep(chance.uniform(0, 0.1))


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path):
    """Even after a failed test."""
    yield
    for pid in alive(tmp_path / "broken"):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_change_nothing(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for where in (whole, broken):
        where.mkdir()
    status, output = run(whole, *SMALL)
    assert status == 0, output
    chance = random.Random(20)
    victims = ["rank", "all"] * 10
    chance.shuffle(victims)
    hits, began = [], time.monotonic()
    for moment, victim in zip(MOMENTS, victims, strict=True):
        hits.append(kill_once(broken, moment, victim, chance))
    print(f"{time.monotonic() - began:.0f} s", hits)
    status, output = run(broken, *SMALL, "resume=auto")
    assert status == 0, output
    assert losses(broken) == losses(whole)
    ours, theirs = tensors(broken), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(ours) > 50
    assert sum(inside for _, _, inside in hits) >= 5, hits
    assert {phase for _, phase, _ in hits} >= {"start", "save", "evaluate"}, hits


def kill_once(where: Path, moment: str, victim: str, chance: random.Random) -> tuple[int, str, bool]:
    """Start, kill, and check that all processes are gone: (step, phase, whether a checkpoint was half written)."""
    process = start(where, *SMALL, "resume=auto")
    rank = chance.randrange(2)
    wait_until(moment, where, rank, chance)
    hit = at(where, rank)
    assert process.is_alive()
    others = [pid for pid in alive(where) if pid not in (hit.pid, process.pid)]
    os.kill(hit.pid, signal.SIGKILL)
    if victim == "all":  # the launcher last: until then it must not take anyone for lost; what it forked goes with it
        for pid in others:
            if chance.random() < 0.5:
                with suppress(ProcessLookupError):  # gone with the rank whose fork it was
                    os.kill(pid, signal.SIGKILL)
        process.kill()
    inside = bool(list((where / "runs" / "run" / "checkpoints").glob(".*partial")))
    process.join(60)
    wait_for(lambda: not alive(where), 30)
    if victim == "rank":
        assert process.exitcode == 1
        assert f"rank {rank} of 2 was killed by SIGKILL" in (where / "output").read_text()
    return hit.step, hit.phase, inside
