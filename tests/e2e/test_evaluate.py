"""Evaluation inside a run, and of a checkpoint by the command: equal answers, nothing disturbed, stops and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from nvlm.commands.evaluate import main
from nvlm.data.loader import Steps
from nvlm.evaluate import task as evaluation
from nvlm.evaluate.during import During
from nvlm.explain.looks import from_mapping
from nvlm.runs.folder import find_checkpoint, step_of
from tests.boards import scalars
from tests.e2e import preloaded
from tests.e2e.faults import replace_steps
from tests.e2e.preloaded import alive, at, start, wait_for
from tests.e2e.runs import SMALL, losses, train

ASKED = ("evaluate.questions=12", "data.heldout_records=12", "train.keep=1")
INSIDE = (*ASKED, "evaluate.every=2", "evaluate.losses=4", "evaluate.best=heldout")


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    """A run that is evaluated every two steps."""
    where = tmp_path_factory.mktemp("inside")
    done = train(where, "name=run", *INSIDE)
    return where / "runs" / "run", done.stdout


def scores(run: Path) -> dict[int, float]:
    """The run's curve of scores by step."""
    found = {step_of(path.parent): json.loads(path.read_text()) for path in run.glob("evaluation/heldout/*/score.json")}
    return {step: score["mean"] for step, score in sorted(found.items())}


def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_evaluation_does_not_disturb_the_run(inside, tmp_path):
    run, output = inside
    train(tmp_path, "name=alone", "data.heldout_records=12")
    assert losses(run) == losses(tmp_path / "runs" / "alone")
    assert list(scores(run)) == [2, 4, 6]
    assert list(json.loads((run / "losses.json").read_text())) == ["0", "2", "4", "6"]
    assert sorted(scalars(run / "tensorboard", "heldout/exact_match")) == [2, 4, 6]
    assert output.count("heldout exact_match=") == 3


def test_the_run_leaves_where_it_looked(inside):
    """For reports; of the first questions whose tiles are cross-attended."""
    run, _ = inside
    given = {(row["question"], row["answer"]) for row in answers(run / "evaluation" / "heldout" / "step_00000006")}
    files = sorted((run / "looks").iterdir())
    assert [path.name for path in files] == [f"heldout_{number}.looks.json" for number in range(3)]
    for values in (json.loads(path.read_text()) for path in files):
        looks = from_mapping(values)
        assert (values["question"], values["answer"]) in given and len(looks.tiles) > 1
        assert "".join(token.text for token in looks.tokens).startswith(values["answer"])
        assert abs(looks.attention.sum(-1) - 1).max() < 1e-3


def test_the_best_checkpoint_outlives_the_newest(inside):
    run, _ = inside
    found = scores(run)
    best = find_checkpoint(run / "checkpoints" / "best", "checkpoint")
    assert step_of(best) == max(found, key=lambda step: (found[step], -step)) == 2
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000002", "step_00000006"]


def test_a_resumed_run_knows_its_best(inside, tmp_path):
    run = shutil.copytree(inside[0], tmp_path / "runs" / "run")
    score = run / "evaluation" / "heldout" / "step_00000002" / "score.json"
    score.write_text(json.dumps(json.loads(score.read_text()) | {"mean": 1.0}))
    train(tmp_path, "name=run", *INSIDE, "resume=auto", "train.steps=8")
    assert (run / "checkpoints" / "best").read_text() == "step_00000002\n"
    assert list(scores(run)) == [2, 4, 6, 8]


def command(where: Path, *words: str) -> int:
    before = Path.cwd()
    os.chdir(where)
    try:
        return main([*words, "train.threads=1"])
    finally:
        os.chdir(before)


def test_the_command_gives_the_answers_of_the_run(inside, tmp_path, capfd):
    run, _ = inside
    own = answers(run / "evaluation" / "heldout" / "step_00000002")
    assert command(tmp_path, f"checkpoint={run}/checkpoints/best", "out=again", "evaluate.batch=5") == 0
    assert answers(tmp_path / "again" / "heldout" / "step_00000002") == own
    assert "heldout exact_match=" in capfd.readouterr().out


class Stop(Exception):
    pass


def test_a_stopped_evaluation_goes_on(inside, tmp_path, monkeypatch):
    run, _ = inside
    words = (f"checkpoint={run}", "out=out", "evaluate.batch=5")
    asked, answer = [], evaluation.answer

    def twice(model, batch, *others):
        if len(asked) == 2:
            raise Stop
        asked.append(len(batch.tokens))
        return answer(model, batch, *others)

    monkeypatch.setattr(evaluation, "answer", twice)
    with pytest.raises(Stop):
        command(tmp_path, *words)
    folder = tmp_path / "out" / "heldout" / "step_00000006"
    assert sorted(path.name for path in folder.iterdir()) == ["answers.0.jsonl", "task.json"]
    asked.clear()
    assert command(tmp_path, *words) == 0
    assert asked == [2]
    assert answers(folder) == answers(run / "evaluation" / "heldout" / "step_00000006")


def test_answers_of_another_checkpoint_are_not_mixed(inside, tmp_path, capfd):
    run, _ = inside
    assert command(tmp_path, f"checkpoint={run}", "out=out", "limit=2") == 0
    others = tmp_path / "out" / "heldout"
    (others / "step_00000006").rename(others / "step_00000002")
    assert command(tmp_path, f"checkpoint={run}/checkpoints/best", "out=out", "limit=2") == 2
    assert "step_00000002: checkpoint: got answers with" in capfd.readouterr().err


def test_another_source_is_asked_after_examples(inside, tmp_path, capfd):
    """With a metric of one's own; the examples are the source's training records."""
    run, _ = inside
    talk = [{"role": "user", "content": "5 + 5?"}, {"role": "assistant", "content": "10.0"}]
    for name, id_ in (("h.jsonl", "asked"), ("t.jsonl", "shown")):
        (tmp_path / name).write_text(json.dumps({"id": id_, "messages": talk}) + "\n")
    source = ("data=jsonl", "data.heldout_path=h.jsonl", "data.path=t.jsonl", "shots=1", "metric=relaxed_accuracy")
    assert command(tmp_path, f"checkpoint={run}", *source, "out=out") == 0
    assert "heldout_1shot relaxed_accuracy=" in capfd.readouterr().out
    (row,) = answers(tmp_path / "out" / "heldout_1shot" / "step_00000006")
    assert row["id"] == "asked" and row["question"] == "5 + 5?" and row["references"] == ["10.0"]


WRONG = {
    (): "checkpoint: got nothing, expected a run folder",
    ("checkpoint=RUN", "arch=decoder"): "arch: got decoder, expected hybrid, which",
    ("checkpoint=RUN", "task=docqa"): "task: got 'docqa', expected one of",
    ("checkpoint=RUN", "task=docvqa"): "data.path: got nothing, expected the folder of docvqa's files",
    ("checkpoint=RUN", "task=docvqa", "metric=anls"): "metric: got anls, expected none, since a benchmark has its own",
    ("checkpoint=RUN", "out=r.jsonl"): "r.jsonl, a file, expected a folder that can be written. Fix: out=DIR",
    ("checkpoint=RUN", "limit=none"): "limit: got 'none', expected a number of questions",
    ("checkpoint=RUN", "metric=bleu"): "metric: got bleu, expected one of",
    ("checkpoint=RUN", "data=jsonl"): "data.heldout_path: got nothing, expected the records that are asked",
    ("checkpoint=RUN", "data=jsonl", "data.heldout_path=no.jsonl"): "data.heldout_path: got 'no.jsonl'",
    ("checkpoint=RUN", "tiling.tags=none"): "tiling.tags: got a key that does not exist, expected one of tiling.tag",
    ("checkpoint=RUN", "data=jsonl", "data.heldout_path=r.jsonl"): "no question with a reference answer: 1 (r.jsonl:1)",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_mistakes_are_named(inside, tmp_path, words, capfd):
    run, _ = inside
    (tmp_path / "r.jsonl").write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    assert command(tmp_path, "out=out", *(word.replace("RUN", str(run)) for word in words)) == 2
    assert WRONG[words] in capfd.readouterr().err


@pytest.mark.slow
def test_a_benchmark_that_is_gone_is_refused_before_and_costs_a_line_within(tmp_path, inside):
    words = ("name=run", *ASKED, "evaluate.tasks=[heldout,gsm8k]", "evaluate.path=bench", "evaluate.every=3")
    done = train(tmp_path, *words, check=False)
    assert done.returncode == 2 and "evaluate.path: got bench, which is no folder" in done.stderr
    (tmp_path / "bench").mkdir()
    question = {"question": "1 + 1?", "answer": "One and one are two. #### 2"}
    (tmp_path / "bench" / "test.jsonl").write_text(json.dumps(question) + "\n")
    status, output = preloaded.run(tmp_path, *SMALL, *words, change=lose_the_benchmark)
    assert status == 0, output
    assert output.count("task gsm8k was not evaluated after step") == 2
    assert len(losses(tmp_path / "runs" / "run")) == 6 and list(scores(tmp_path / "runs" / "run")) == [3, 6]


class Losing(Steps):
    """The benchmark's files are deleted once training has begun."""

    def __getitem__(self, step):
        shutil.rmtree("bench", ignore_errors=True)
        return super().__getitem__(step)


def lose_the_benchmark() -> None:
    replace_steps(Losing)


def slow_evaluation() -> None:
    call = During.__call__

    def slow(self, trainer, step, alive, stop):
        return call(self, trainer, step, alive, stop) if step != 4 else wait_for(stop) and None

    During.__call__ = slow


@pytest.mark.slow
def test_a_signal_during_an_evaluation_saves_and_the_resumed_run_makes_up_for_it(tmp_path, inside):
    process = start(tmp_path, *SMALL, "name=run", *INSIDE, change=slow_evaluation)
    try:
        wait_for(lambda: (now := at(tmp_path, 0)) and (now.step, now.phase) == (4, "evaluate"))
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
    finally:
        for pid in alive(tmp_path):
            os.kill(pid, signal.SIGKILL)
    run = tmp_path / "runs" / "run"
    assert (run / "checkpoints" / "latest").read_text() == "step_00000004\n"
    assert "stopped by SIGTERM after step 4" in (tmp_path / "output").read_text()
    train(tmp_path, "name=run", *INSIDE, "resume=auto")
    assert losses(run) == losses(inside[0])
    assert list(scores(run)) == [2, 4, 6]
