"""Few-shot examples: which are chosen, and what stands before a question. Records of a data source as questions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nvlm.commands.compose import compose_config
from nvlm.data.messages import read_turns
from nvlm.data.record import BadRecord, Record
from nvlm.data.sources.registry import build_records
from nvlm.tasks.files import read_task
from nvlm.tasks.question import Question
from nvlm.tasks.records import RecordQuestions
from nvlm.tasks.registry import build_questions
from nvlm.tasks.shots import Examples, as_example, examples_of, usual_answer, with_examples
from tests.unit.tasks import folders


class Pool:
    """Questions n = 0, 1, ..., of which those in `bad` cannot be read."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Question:
        if index in self.bad:
            raise BadRecord("broken")
        record = Record(f"q{index}", [{"role": "user", "content": f"What is {index}?"}], [bytes([index])])
        return Question(record=record, references=(str(index),))

    def name(self, index: int) -> str:
        return f"q{index}"


def chosen(examples: Examples, index: int, count: int) -> list[str]:
    return [one.record.id for one in examples.before(index, f"q{index}", "", count)]


def test_examples_are_drawn_by_seed_and_name_and_never_the_question_itself():
    examples = Examples(Pool(50), "test", True, 0, {})
    drawn = [chosen(examples, index, 4) for index in range(50)]
    assert drawn == [chosen(Examples(Pool(50), "test", True, 0, {}), index, 4) for index in range(50)]
    assert all(len(set(names)) == 4 and f"q{index}" not in names for index, names in enumerate(drawn))
    assert len({tuple(names) for names in drawn}) > 40
    assert drawn != [chosen(replace(examples, seed=1), index, 4) for index in range(50)]
    assert len({name for names in drawn for name in names}) > 45  # from everywhere
    assert (
        chosen(Examples(Pool(3), "train", False, 0, {}), 1, 5)
        and len(chosen(Examples(Pool(3), "test", True, 0, {}), 1, 5)) == 2
    )


def test_all_other_questions_are_drawn_once():
    found = chosen(Examples(Pool(40), "test", True, 3, {}), 7, 39)
    assert sorted(found) == sorted(f"q{n}" for n in range(40) if n != 7)


def test_unreadable_examples_are_passed_over():
    examples = Examples(Pool(10, bad=(1, 2, 3, 4, 5)), "test", True, 0, {})
    assert set(chosen(examples, 0, 4)) == {"q6", "q7", "q8", "q9"}


def test_an_example_is_a_turn_with_its_images_and_a_turn_with_its_answer():
    pool = Pool(3)
    marked = Record("m", [{"role": "user", "content": "Is <image> \\<image> or <image>?"}], [b"x", b"y"])
    question = Question(record=marked, references=("b", "a", "a"), shown="")
    asked = with_examples(pool[2], [pool[0], question])
    turns = read_turns(asked.record.messages)
    assert [turn.role for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert turns[0].texts == ("", "\nWhat is 0?") and turns[1].texts == ("0",)
    assert turns[2].texts == ("Is ", " <image> or ", "?") and turns[3].texts == ("a",)
    assert turns[4].texts == ("", "\nWhat is 2?")
    assert asked.record.images == [b"\0", b"x", b"y", b"\2"] and asked.references == ("2",)
    assert sum(turn.images for turn in turns) == 4
    assert with_examples(pool[2], []) is not None and with_examples(pool[2], []).record == pool[2].record
    assert read_turns(as_example(question, "<image> is it").messages)[-1].texts == ("<image> is it",)


def test_the_usual_answer_is_what_is_shown_else_the_most_frequent_first():
    question = Question(record=Record("", [], []), references=("b", "a", "c", "a", "b"))
    assert usual_answer(question) == "b"
    assert usual_answer(replace(question, shown="as follows: a")) == "as follows: a"


def test_examples_come_from_the_split_for_them_by_category(tmp_path):
    folders.mmlu(tmp_path)
    task = read_task("mmlu")
    questions = build_questions(task, tmp_path)
    examples = examples_of(task, tmp_path, questions, seed=0)
    assert (examples.split, examples.own) == ("dev", False)
    for index in range(len(questions)):
        question = questions[index]
        found = examples.before(index, questions.name(index), question.category, 5)
        assert len({one.record.id for one in found}) == 5
        assert {one.category for one in found} == {question.category}
        assert all(" dev " in one.record.messages[0]["content"] for one in found)


def test_without_the_split_s_files_examples_are_other_questions(tmp_path):
    folders.docvqa(tmp_path)
    task = read_task("docvqa")
    questions = build_questions(task, tmp_path)
    examples = examples_of(task, tmp_path, questions, seed=0)
    assert (examples.split, examples.own) == ("validation", True)
    assert {one.record.id for one in examples.before(0, questions.name(0), "", 2)} == {"338", "339"}
    folders.gsm8k(tmp_path / "gsm8k")
    examples = examples_of(read_task("gsm8k"), tmp_path / "gsm8k", questions, seed=0)
    (example,) = examples.before(0, "any", "", 1)
    assert as_example(example).messages[-1]["content"].endswith("#### 1,004")


@pytest.mark.parametrize(
    ("task", "row", "references", "options"),
    [
        ("vqa", {"answer": ["red", "dark red", "dark red"]}, ("red", "dark red", "dark red"), ()),
        ("vqa", {"answer": "red"}, ("red",), ()),
        ("choice", {"answer": "no", "options": ["yes", "no"]}, ("B",), ("yes", "no")),
    ],
)
def test_records_keep_all_answers_and_their_options(tmp_path, task, row, references, options):
    folders.write_image(tmp_path / "a.png")
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "What?", "image": "a.png", **row}) + "\n")
    path = tmp_path / "a.jsonl"
    config = compose_config("data=jsonl", f"data.path={path}", f"data.heldout_path={path}", f"data.task={task}")
    records = build_records(config.data, config.seed, heldout=True)
    question = RecordQuestions(records)[0]
    assert (question.references, question.options) == (references, options)
    assert [turn.role for turn in read_turns(question.record.messages)] == ["user"]
    answer = {"red": "red", "no": "B"}.get(str(row["answer"]), "dark red")
    assert records[0].messages[-1] == {"role": "assistant", "content": answer}  # what training learns
