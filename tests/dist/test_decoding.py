"""A replica's ranks divide a step's pictures: each is decoded once, and all ranks agree on the broken ones."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.data import samples
from nvlm.data.loader import load_steps
from nvlm.processes import groups
from nvlm.train.agree import agreed
from nvlm.train.loop import build_steps, build_trainer
from nvlm.train.step import train_step
from tests.dist.run import joined, run_distributed

DATA = (
    "data=jsonl", "data.workers=0", "data.row_length=600", "data.seq_length=1024", "data.window=1",
    "train.global_batch=8", "train.micro_batch=2",
)  # fmt: skip
FOUR = ("parallel.tensor=2", "parallel.pipeline=2", "llm.layers=4")


def write_records(folder, count, broken=()):
    """Records of two pictures, no two alike; in those of `broken`, the second picture's pixels are cut off."""
    lines = []
    for number in range(count):
        names = [f"{number}.{which}.jpg" for which in range(2)]
        for which, name in enumerate(names):
            noise = np.random.default_rng((number, which)).integers(0, 255, (120 * (1 + number % 3), 120 + which, 3))
            Image.fromarray(noise.astype(np.uint8)).save(folder / name)
        if number in broken:
            (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:3000])
        talk = [{"role": "user", "content": "<image> <image>?"}, {"role": "assistant", "content": f"No. {number}."}]
        lines.append(json.dumps({"id": str(number), "messages": talk, "images": names}))
    (folder / "records.jsonl").write_text("\n".join(lines))
    return f"data.path={folder}/records.jsonl"


def decoded(overrides):
    """The names of the pictures that this rank's loader decodes for two steps, and the tiles of those steps."""
    config, names, decode = compose_config(*DATA, *overrides), [], samples.decode_image

    def counted(source, *limits):
        names.append(source.name)
        return decode(source, *limits)

    with joined(config):
        samples.decode_image = counted
        try:
            steps = [step for _, step in zip(range(2), load_steps(build_steps(config), 0, 0))]
        finally:
            samples.decode_image = decode
        here = [sum(len(batch.pixels) for batch in step.micro_batches) for step in steps]
        return names, here, [step.work.tiles for step in steps], groups.data_rank()[0]


@pytest.mark.parametrize(
    ("world", "layout"),
    [(4, FOUR), (2, ("parallel.context=2",)), (4, ("parallel.tensor=2",))],
    ids=["tensor 2 x pipeline 2", "context 2", "tensor 2 x data 2"],
)
def test_the_ranks_of_a_replica_decode_each_picture_once(tmp_path, world, layout):
    path = write_records(tmp_path, 16)  # two steps are one epoch
    ranks = run_distributed(decoded, world, (path, "arch=hybrid", *layout))
    pictures = Counter(name for names, *_ in ranks for name in names)
    assert pictures == Counter({f"{number}.{which}.jpg": 1 for number in range(16) for which in range(2)})
    replicas = {replica for *_, replica in ranks}
    for step in range(2):
        for replica in replicas:
            here = [tiles[step] for _, tiles, _, of in ranks if of == replica]
            assert sum(here) == next(whole[step] for *_, whole, of in ranks if of == replica)
            assert max(here) - min(here) <= 4  # the tiles of one picture


def stepped(overrides):
    """Loss, gradient norm and counts of one step, and what was skipped."""
    config = compose_config(*DATA, *overrides)
    with joined(config) as device:
        trainer = build_trainer(config, device)
        data = agreed(next(load_steps(build_steps(config), 0, 0)), trainer.vision.team.replica, device)
        result = train_step(trainer, data)
        return result.loss, result.grad_norm, result.trained_tokens, result.skipped, result.records, data.skipped


@pytest.mark.parametrize("arch", ["decoder", "hybrid"])
@pytest.mark.parametrize("layout", [("parallel.tensor=2",), ("parallel.pipeline=2",)], ids=" ".join)
def test_a_broken_picture_is_left_out_on_all_ranks_as_in_one_process(tmp_path, arch, layout):
    path = write_records(tmp_path, 8, broken=(2, 5))
    model = (path, f"arch={arch}", "llm.layers=4", "precision=fp32")
    (alone,) = run_distributed(stepped, 1, model)
    *_, skipped, records, named = alone
    assert (skipped, records) == (2, 8)
    assert sorted(name for name, _ in named) == ["records.jsonl:3", "records.jsonl:6"]
    assert all("truncated" in reason for _, reason in named)
    for rank in run_distributed(stepped, 2, (*model, *layout)):
        assert rank[:2] == pytest.approx(alone[:2], rel=1e-4)
        assert rank[2:] == alone[2:]


def refused(overrides, picture):
    """What this rank says if `picture` has another size than when its step was planned."""
    config = compose_config(*DATA, *overrides)
    with joined(config) as device:
        replica, steps = build_trainer(config, device).vision.team.replica, build_steps(config)
        steps.planned(0)
        dist.barrier()
        if groups.is_first_rank():
            Image.new("RGB", (33, 44)).save(picture)
        dist.barrier()
        with pytest.raises(ConfigError) as reason:
            agreed(next(load_steps(steps, 0, 0)), replica, device)
        return str(reason.value)


def test_a_picture_that_changed_ends_all_ranks_of_a_replica_with_the_same_line(tmp_path):
    path = write_records(tmp_path, 8)
    reasons = run_distributed(refused, 2, (path, "arch=decoder", "parallel.tensor=2"), tmp_path / "3.1.jpg")
    assert len(set(reasons)) == 1
    assert "px when it was planned, 33 x 44 px now. Fix: do not change records or images" in reasons[0]
