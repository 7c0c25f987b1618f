"""Every layout gives the answers of one process, each question answered once (fp32)."""

from __future__ import annotations

import pytest

from nvlm.commands.compose import compose_config
from nvlm.data.sources.registry import build_records
from nvlm.evaluate import task as evaluation
from nvlm.evaluate.kept import Kept
from nvlm.evaluate.looks import explain_some
from nvlm.evaluate.stop import Stopped
from nvlm.evaluate.tasks import Task, build_task
from nvlm.generate.generator import Generator
from nvlm.processes import groups
from nvlm.tasks.files import read_task
from nvlm.tasks.records import RecordQuestions
from nvlm.tasks.shots import Examples
from nvlm.train.loop import build_trainer
from tests.dist.run import joined, run_distributed

SMALL = (
    "precision=fp32", "llm.layers=4", "llm.cross_every=2", "data.heldout_records=11", "data.records=16",
    "evaluate.batch=3", "evaluate.questions=null", "evaluate.max_new_tokens=5",
)  # fmt: skip
LAYOUTS = {
    2: [
        "parallel.data=2 data.workers=1",
        "parallel.tensor=2 parallel.sequence=true",
        "parallel.pipeline=2",
        "parallel.context=2",
    ],
    4: ["parallel.data=2 parallel.pipeline=2 parallel.virtual=2", "parallel.data=2 parallel.tensor=2"],
}
ALL = [
    pytest.param(world, layout, id=layout, marks=[pytest.mark.slow] if world > 2 else [])
    for world, layouts in LAYOUTS.items()
    for layout in layouts
]


def model_of(config, device) -> Generator:
    """Initial weights, which are the same in every layout."""
    trainer = build_trainer(config, device)
    return Generator(config, trainer.pipeline, trainer.vision, device)


def answered(overrides, folder=None, looks=None):
    """This rank's result, and the numbers of questions that its replica answered. `looks`: where it writes what some of
    the answers looked at."""
    config, own, batch = compose_config(*SMALL, *overrides), [], evaluation.answer_batch

    def counted(model, task, read, processor):
        own.extend(index for index, _ in (*read.rows, *read.unasked))
        return batch(model, task, read, processor)

    with joined(config) as device:
        evaluation.answer_batch = counted
        try:
            kept = Kept(folder, {}) if folder else None
            model, task = model_of(config, device), build_task("heldout", config)
            found = evaluation.evaluate(model, task, kept)
            if looks:
                explain_some(model, task, found.rows, looks)
        finally:
            evaluation.answer_batch = batch
        return found.rows, own, groups.data_rank()[0]


@pytest.fixture(scope="module")
def alone():
    return {arch: run_distributed(answered, 1, (f"arch={arch}",))[0][0] for arch in ("hybrid", "decoder")}


@pytest.mark.parametrize(("world", "layout"), ALL)
def test_a_layout_gives_the_answers_of_one_process(world, layout, alone, tmp_path):
    for arch in ("hybrid",) if world == 2 else alone:
        (tmp_path / arch).mkdir()
        ranks = run_distributed(answered, world, (f"arch={arch}", *layout.split()), None, tmp_path / arch)
        explained = arch == "hybrid" and not any(word in layout for word in ("pipeline", "context"))
        assert len(list(tmp_path.glob(f"{arch}/looks/*.looks.json"))) == 3 * explained
        assert ranks[0][0] == alone[arch] and len(alone[arch]) == 11
        assert all(rows == {} for rows, _, _ in ranks[1:])
        replicas = {replica: own for _, own, replica in ranks}
        assert sorted(number for own in replicas.values() for number in own) == list(range(11))
        assert {len(own) for own in replicas.values()} <= {11, 5, 6}


def test_another_layout_goes_on_where_one_was_stopped(tmp_path, alone):
    """What one replica kept is not asked again by two."""
    run_distributed(stopped_at, 1, ("arch=hybrid",), tmp_path, 2)
    ranks = run_distributed(answered, 2, ("arch=hybrid", "parallel.data=2"), tmp_path)
    assert sorted(number for _, own, _ in ranks for number in own) != list(range(11))
    assert sum(len(own) for _, own, _ in ranks) == 11 - 6
    assert ranks[0][0] == alone["hybrid"]


def stopped_at(overrides, folder, batches):
    """An evaluation that is told to stop after so many batches."""
    config, asked = compose_config(*SMALL, *overrides), iter(range(batches))
    with joined(config) as device, pytest.raises(Stopped):
        task = build_task("heldout", config)
        evaluation.evaluate(model_of(config, device), task, Kept(folder, {}), stop=lambda: next(asked, None) is None)


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_examples_with_pictures_come_before_the_question(arch):
    prompt, rows = run_distributed(with_two_examples, 1, f"arch={arch}")[0]
    assert prompt == (3, ["user", "assistant"] * 2 + ["user"])
    assert len(rows) == 3 and all("reason" not in row for row in rows.values())


def with_two_examples(arch):
    config = compose_config(*SMALL, arch)
    asked, shown = (RecordQuestions(build_records(config.data, config.seed, heldout=x)) for x in (True, False))
    task = Task(read_task("heldout"), asked, 3, 2, Examples(shown, "training", False, 0, {}))
    with joined(config) as device:
        record = task.question(0).record
        rows = evaluation.evaluate(model_of(config, device), task).rows
        return (len(record.images), [message["role"] for message in record.messages]), rows
