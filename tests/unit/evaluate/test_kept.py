"""Answers of a stopped evaluation are used again, unless they answer something else."""

from __future__ import annotations

import json

import pytest

from nvlm.config.values import ConfigError
from nvlm.evaluate.checkpoint import definition
from nvlm.evaluate.kept import Kept, clear
from nvlm.evaluate.order import Prompt
from nvlm.evaluate.score import digest, score_of, scored
from nvlm.evaluate.tasks import Task
from nvlm.tasks.files import read_task

DEFINITION = {"checkpoint": "c0ffee", "task": {"name": "t", "shots": 0}, "tiling": {"tag": "1d"}}


def row(number, answer="a", text="What?"):
    return {"id": f"q{number}", "question": text, "answer": answer, "references": ["é"], "category": "k", "tiles": 2}


def prompts(count, text="What?"):
    return [Prompt(number, 10, 0, 1, digest(row(number, "", text))) for number in range(count)]


@pytest.fixture
def stopped(tmp_path):
    """An evaluation of six questions that was stopped: two replicas, and a line that was cut short."""
    kept = Kept(tmp_path / "t", DEFINITION)
    assert kept.begin(prompts(6)) == {}
    kept.append(0, [row(0), row(2)])
    kept.append(1, [row(1, "b")])
    kept.append(0, [row(4)])
    with open(kept.folder / "answers.1.jsonl", "a") as file:
        file.write(json.dumps(row(3))[:-9])
    return kept


def test_another_number_of_replicas_goes_on(stopped):
    assert stopped.begin(prompts(6)) == {0: row(0), 1: row(1, "b"), 2: row(2), 4: row(4)}
    stopped.append(1, [row(3)])  # after what was cut off
    stopped.append(5, [row(5)])
    found = stopped.begin(prompts(6))
    assert sorted(found) == list(range(6))
    rows = scored([found[number] for number in range(6)], "exact_match")
    stopped.finish(rows, score_of(rows, "t", "exact_match", 7, "", 0))
    assert sorted(path.name for path in stopped.folder.iterdir()) == ["answers.jsonl", "score.json", "task.json"]
    lines = (stopped.folder / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"q{number}" for number in range(6)]


def test_more_questions_are_added_to_a_finished_evaluation(tmp_path):
    kept = Kept(tmp_path, DEFINITION)
    kept.begin(prompts(2))
    rows = scored([row(0), row(1)], "exact_match")
    kept.finish(rows, score_of(rows, "t", "exact_match", 7, "", 0))
    assert sorted(kept.begin(prompts(4))) == [0, 1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"checkpoint": "0ff"}, "checkpoint: got answers with c0ffee, expected 0ff"),
        ({"task": {"name": "t", "shots": 4}}, "task.shots: got answers with 0, expected 4"),
        ({"tiling": {}}, "tiling.tag: got answers with 1d, expected null"),
    ],
)
def test_answers_of_something_else_are_refused_and_stay(stopped, changed, said):
    with pytest.raises(ConfigError, match=said):
        Kept(stopped.folder, DEFINITION | changed).begin(prompts(6))
    assert len(stopped.begin(prompts(6))) == 4


TASK = Task(read_task("heldout"), questions=(), count=0)


@pytest.mark.parametrize("word", ["arch.bind_tags=none", "llm.rope_theta=5e5", "tiling.tag=none", "precision=fp32"])
def test_another_model_around_the_same_weights_gives_other_answers(configured, word):
    assert definition(configured("arch=hybrid", word), TASK) != definition(configured("arch=hybrid"), TASK)


def test_how_a_model_is_run_changes_no_answer(configured):
    words = ("vision.tiles_per_call=3", "tiling.resize=fast", "parallel.tensor=2", "evaluate.batch=3", "seed=5")
    assert definition(configured(*words), TASK) == definition(configured(), TASK)


def test_answers_to_other_questions_are_refused(stopped):
    with pytest.raises(ConfigError, match="question: got q0, which this evaluation does not ask"):
        stopped.begin(prompts(6, "Who?"))
    with pytest.raises(ConfigError, match="question: got q4"):
        stopped.begin(prompts(3))


def test_a_question_that_could_not_be_read_is_asked_again(tmp_path):
    kept = Kept(tmp_path, DEFINITION)
    kept.begin(prompts(1))
    kept.append(0, [row(0) | {"reason": "gone.png: no such image"}])
    assert kept.begin(prompts(1)) == {}


def test_a_damaged_line_is_named(stopped):
    path = stopped.folder / "answers.0.jsonl"
    path.write_text(path.read_text().replace('"answer"', "answer", 1))
    with pytest.raises(ConfigError, match="answers.0.jsonl, line 1: got a damaged line.*Fix: sed -i 1d"):
        stopped.begin(prompts(6))


def test_a_run_s_own_result_is_replaced(tmp_path):
    (tmp_path / "answers.jsonl").write_text(json.dumps(row(0)) + "\n")
    (tmp_path / "score.json").write_text("{}")
    assert Kept(tmp_path, DEFINITION).begin(prompts(1)) == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["task.json"]


def test_a_run_s_own_result_stays_if_it_has_other_questions(tmp_path):
    (tmp_path / "answers.jsonl").write_text(json.dumps(row(0)) + "\n" + json.dumps(row(1)) + "\n")
    (tmp_path / "score.json").write_text("{}")
    for fewer in (prompts(1), prompts(2, "Who?")):
        with pytest.raises(ConfigError, match="which this evaluation does not ask.*Fix: out=DIR"):
            Kept(tmp_path, DEFINITION).begin(fewer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "score.json"]


def test_scores_of_the_answers_beside_them_are_no_answers(stopped):
    (stopped.folder / "answers.scores.jsonl").write_text('{"id": "q0", "score": 1.0}\n')  # by answers=FILE metric=...
    assert len(stopped.begin(prompts(6))) == 4
    clear(stopped.folder)
    assert [path.name for path in stopped.folder.iterdir()] == ["answers.scores.jsonl"]


def test_two_evaluations_do_not_share_a_folder(tmp_path):
    kept = Kept(tmp_path, DEFINITION)
    with kept.locked():
        with pytest.raises(ConfigError, match="in use"), kept.locked():
            pass
    with kept.locked():
        pass
