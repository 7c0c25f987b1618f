"""The loss on held-out records: that of each record alone, whatever the layout, and without a trace in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nvlm.arch.registry import placement_rule
from nvlm.commands.compose import compose_config
from nvlm.data.outline import build_processor
from nvlm.data.pack import collate
from nvlm.data.samples import encode
from nvlm.data.sources.registry import build_records
from nvlm.evaluate.losses import Loss, measure
from nvlm.runs.ownership import begin
from nvlm.train.checkpoint import restore
from nvlm.train.checkpoint.save import latest
from nvlm.train.step import Trainer
from tests.dist.checkpoints import FP32, built, saved
from tests.dist.run import joined, run_distributed

PAGES = "source: pages, records: 16, heldout_records: 9, questions: 2, weight: 1"
RUN = (
    *FP32, "data=blend", "data.workers=0", "data.window=1", "data.row_length=300", "train.micro_batch=2",
    "evaluate.losses=7", f"data.sources={{pages: {{{PAGES}}}, text: {{{PAGES}, form: text, text_only: true}}}}",
)  # fmt: skip
RUN = tuple(word for word in RUN if not word.startswith("data.records="))
LAYOUTS = (
    ("parallel.data=2",),
    ("parallel.tensor=2", "parallel.sequence=true"),
    ("parallel.pipeline=2", "parallel.virtual=2"),
    ("parallel.context=2", "train.micro_batch=1"),
)


def measured(trainer: Trainer, *overrides: str) -> dict[str, Loss]:
    config = compose_config(*RUN, *overrides)
    beats: list[None] = []
    found = measure(trainer, build_records(config.data, config.seed, heldout=True), config, lambda: beats.append(None))
    assert len(beats) == 4  # two batches of each source
    return found


def alone(trainer: Trainer) -> dict[str, float]:
    """The mean loss of each source's first seven records, one by one."""
    config = compose_config(*RUN)
    processor = build_processor(config, placement_rule(config.arch.name), resize="exact")
    [model] = trainer.pipeline.parts
    found = {}
    for name, part in build_records(config.data, config.seed, heldout=True).records.parts.items():
        losses, count = 0.0, 0
        for index in range(7):
            batch = trainer.vision.encode([collate([[encode(part[index], processor)]], config.vision.tile_size)])[0]
            with torch.no_grad():
                losses += float(model(batch).sum())
            count += batch.num_trained
        found[name] = losses / count
    return found


def in_one_process(run: Path) -> tuple[dict[str, Loss], dict[str, float], list, list]:
    """What one process measures after a step, the reference, and two training steps with and without measuring."""
    config = compose_config(*RUN)
    with joined(config) as device:
        trainer, step = built(RUN, device)
        step()
        begin(config, run, fresh=True)
        saved(trainer, RUN, run, 1)
        found, expected = measured(trainer), alone(trainer)
        again = [step(), step()]
    with joined(config) as device:
        _, step = built(RUN, device)
        return found, expected, again, [step(), step(), step()][1:]


def in_layout(run: Path, layout: tuple[str, ...]) -> dict[str, Loss]:
    with joined(compose_config(*RUN, *layout)) as device:
        trainer, _ = built((*RUN, *layout), device)
        restore.load_weights(trainer.pipeline.parts, latest(run))
        dist.barrier()
        return measured(trainer, *layout)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    return run, *run_distributed(in_one_process, 1, run)[0]


def test_the_loss_is_that_of_each_record_alone(one):
    _, found, expected, _, _ = one
    assert {name: one.loss for name, one in found.items()} == pytest.approx(expected, rel=1e-5)
    assert found.keys() == {"pages", "text"} and abs(expected["pages"] - expected["text"]) > 1e-3
    assert all((loss.records, loss.skipped) == (7, 0) and loss.tokens >= 14 for loss in found.values())


def test_training_goes_on_as_if_nothing_had_been_measured(one):
    *_, after, without = one
    assert after == without


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_the_loss_is_the_same_in_any_layout(one, layout):
    run, found, *_ = one
    for got in run_distributed(in_layout, 2, run, layout):
        assert got.keys() == found.keys()
        for name, loss in got.items():
            assert loss.loss == pytest.approx(found[name].loss, rel=1e-5)
            assert (loss.tokens, loss.records) == (found[name].tokens, found[name].records)
