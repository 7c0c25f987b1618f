"""Benchmarks in the layouts in which they are published: what is asked, with which references, and bad folders."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm.config.mapping import from_mapping
from nvlm.config.task import TaskConfig
from nvlm.config.values import ConfigError
from nvlm.data.messages import NoAnswer, read_turns
from nvlm.data.record import BadRecord
from nvlm.metrics.line import Line
from nvlm.metrics.needs import lacking
from nvlm.metrics.registry import METRICS, scored
from nvlm.tasks.asked import question_of
from nvlm.tasks.files import read_task, task_names
from nvlm.tasks.layouts import vqav2
from nvlm.tasks.question import Question
from nvlm.tasks.registry import LAYOUTS, RECORDS, build_questions, check_folder, folder_of
from nvlm.tasks.rows import rows_under
from tests.unit.tasks import folders
from tests.unit.tasks.folders import FOLDERS

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
RELEASES = [(task, write) for task, writers in FOLDERS.items() for write in writers]
EXPECTED = {  # of the first question of each folder: its text, references, and other fields
    "docvqa": (f"what is the date?{SHORT}", ("1/8/93", "8 January 1993"), {"category": "handwritten"}),
    "chartqa": (f"How many?{SHORT}", ("14",), {"category": "human"}),
    "textvqa": (f"what brand is it?{SHORT}", (*["nokia"] * 9, "nokía"), {}),
    "vqav2": (f"Where is he looking?{SHORT}", (*["down"] * 8, "at table", "skateboard"), {"category": "other"}),
    "ai2d": (f"What is A?\nA. ears\nB. nose{LETTER}", ("B",), {"options": ("ears", "nose")}),
    "mmmu": (
        f"Who painted <image>?\nA. Bosch\nB. Rubens'\nC. Dou{LETTER}",
        ("B",),
        {"options": ("Bosch", "Rubens'", "Dou"), "type": "multiple-choice", "category": "Art Theory"},
    ),
    "ocrbench": (
        folders.OCRBENCH["question"],
        ("x ^ { 2 }",),
        {"type": "HME100k", "category": "Handwritten Mathematical Expression Recognition"},
    ),
    "realworldqa": (folders.REALWORLDQA["question"], ("C",), {"options": ("Left.", "Right.", "Both.")}),
    "gsm8k": (None, ("1,004",), {"shown": "2 + 2 = 4\n4 + 1,000 = 1,004\n#### 1,004"}),
}


def said(question: Question) -> str:
    """The question's text, with <image> for each mark."""
    (turn,) = read_turns(question.record.messages)
    assert turn.role == "user"
    return "<image>".join(turn.texts)


def read(name: str, folder: Path, **changes) -> list[Question]:
    questions = check_folder(replace(read_task(name), **changes), folder)
    return [questions[index] for index in range(len(questions))]


def test_every_layout_is_tested():
    assert set(LAYOUTS) == set(FOLDERS)
    assert all(len(LAYOUTS[task]) == len(writers) for task, writers in FOLDERS.items())


@pytest.mark.parametrize("name", task_names())
def test_every_task_names_what_exists(name):
    task = read_task(name)
    assert task.name == name and task.layout in (*LAYOUTS, RECORDS) and task.metric in METRICS
    assert (task.prompt is None) == (task.layout == RECORDS)


@pytest.mark.parametrize(("name", "write"), RELEASES)
def test_every_release_is_asked_as_it_is_meant_and_a_right_answer_scores(tmp_path, name, write):
    write(tmp_path)
    questions = read(name, tmp_path)
    if name in EXPECTED:
        text, references, others = EXPECTED[name]
        assert text is None or said(questions[0]) == text
        assert questions[0].references == references
        assert {field: getattr(questions[0], field) for field in others} == others
    task = read_task(name)
    fields = [
        {"id": q.record.id, "references": q.references, "options": q.options, "type": q.type, "category": q.category}
        for q in questions
    ]
    right = [Line(answer=q.references[0], **line) for q, line in zip(questions, fields)]
    assert not [lacking(task.metric, line) for line in right if lacking(task.metric, line)]
    assert min(scored(task.metric, right)) >= 0.9
    assert max(scored(task.metric, [Line(answer="no idea at all", **line) for line in fields])) == 0
    assert len({q.record.id for q in questions}) == len(questions)
    for question in questions:
        images = read_turns(question.record.messages)[0].images
        assert images in (0, len(question.record.images))
        assert all(isinstance(one, bytes) or one.is_file() for one in question.record.images)
        assert bool(question.record.images) == (name not in ("mmlu", "gsm8k"))


def test_a_benchmark_of_several_files_is_read_whole(tmp_path):
    folders.docvqa_parquet(tmp_path)
    assert [q.record.id for q in read("docvqa", tmp_path)] == ["337", "338", "339"]  # and not InfographicVQA's
    folders.chartqa(tmp_path / "charts")
    assert [q.category for q in read("chartqa", tmp_path / "charts")] == ["human", "augmented"]


def test_mmlu_and_mathvista(tmp_path):
    folders.mmlu(tmp_path / "mmlu")
    questions = read("mmlu", tmp_path / "mmlu")
    assert [q.category for q in questions] == ["abstract algebra", "abstract algebra", "anatomy", "anatomy"]
    assert said(questions[1]).startswith("abstract_algebra test 1, which?\nA. 1\nB. 3\nC. 4\nD. 5\n")
    assert questions[1].references == ("B",)
    folders.mathvista(tmp_path / "own")
    (question,) = read("mathvista", tmp_path / "own")
    assert (question.type, question.category) == ("float:1", "geometry problem solving")
    assert said(question).startswith("Hint: give one decimal place.")
    (tmp_path / "own/data/query.json").unlink()
    assert said(read("mathvista", tmp_path / "own")[0]) == "Question: How long is x? (Unit: cm)"
    folders.mathvista_parquet(tmp_path / "hub")
    (question,) = read("mathvista", tmp_path / "hub")
    assert (question.options, question.references) == (("1", "2"), ("2",)) and said(question).count("(B) 2") == 1


def test_mmmu_puts_each_image_where_it_is_mentioned(tmp_path):
    row = folders.MMMU | {"question": "Which of <image 2> and <image 1> is <image>?", "options": "['<image 3>', 'no']"}
    row |= {f"image_{n}": folders.stored(10 + n) for n in (1, 2, 3, 4)}
    folders.write_parquet(tmp_path / "Math/validation-00000-of-00001.parquet", [row, row | {"image_3": None}])
    questions = build_questions(read_task("mmmu"), tmp_path)
    question = questions[0]
    (turn,) = read_turns(question.record.messages)
    # The fourth is not mentioned, so it goes first; the text <image> of the question is no image.
    assert turn.texts[:4] == ("", "\nWhich of ", " and ", " is <image>?\nA. ")
    assert question.record.images == [folders.png(10 + n) for n in (4, 2, 1, 3)]
    with pytest.raises(BadRecord, match="mentions <image 3>, which the row does not have"):
        questions[1]


def test_an_open_question_has_a_prompt_and_references_of_its_own(tmp_path):
    folders.mmmu(tmp_path)
    question = read("mmmu", tmp_path)[1]
    assert said(question) == f"<image>\nFind x.{SHORT}" and question.references == ("0.5", "1/2")
    assert (question.type, question.category, question.options) == ("open", "Math", ())


def test_abc_questions_show_the_diagram_with_letters(tmp_path):
    folders.ai2d(tmp_path)
    images = [q.record.images[0].parent.name for q in read("ai2d", tmp_path)]
    assert images == ["images", "abc_images"]  # and the third is for training


def test_vqa_answers_are_found_in_any_order_and_a_question_without_one_is_named(tmp_path):
    folders.vqav2(tmp_path, numbers=(0, 1, 2, 3), answers=(2, 0, 1))
    questions = build_questions(read_task("vqav2"), tmp_path)
    assert [questions[index].record.id for index in range(3)] == ["262148000", "262148001", "262148002"]
    with pytest.raises(NoAnswer, match="no answer"):
        questions[3]
    assert questions.name(3) == "v2_OpenEnded_mscoco_val2014_questions.json:3"


def test_published_answers_that_are_in_order_are_not_searched(tmp_path, monkeypatch):
    folders.vqav2(tmp_path)
    questions = build_questions(read_task("vqav2"), tmp_path)
    monkeypatch.setattr(vqav2.Paired, "_places", property(lambda self: pytest.fail("searched")))
    assert [questions[index].category for index in (2, 0, 1)] == ["other"] * 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"info": {"data": [1]}, "datum": []}', "without a list `data`"),
        ('{"data": {"a": 1}}', "without a list `data`"),
        ('{"info": "x", "data": [{"a": 1}, {"b"', "damaged or cut short after 1 elements"),
        ('{"info": "x", "da', "damaged or cut short"),
        ('{"info" "x"}', "damaged or cut short"),
        ('{"info": ' + "[" * 100_000, "damaged or cut short"),
        ("{", "damaged or cut short"),
    ],
)
def test_a_damaged_json_file_is_refused_by_name(tmp_path, text, reason):
    path = tmp_path / "val_v1.0.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{path}.*{reason}"):
        rows_under(path, "data", "data.path")


def test_objects_in_a_list_are_found_by_bytes(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('\ufeff {"é": "[{", "data" : [ {"a": "ü"},\n{"a": "😀"} ], "more": 1}'.encode())
    rows = rows_under(path, "data", "data.path")
    assert [rows[index] for index in range(len(rows))] == [{"a": "ü"}, {"a": "😀"}]


VALUES = st.sampled_from([None, 1.5, "é[{", '"data": [', "\\\\", [[], {"data": [{}]}], {"data": ["]"]}, "\U0001f600"])
KEYS = st.sampled_from(["a", "ü{", "datum", 'data"', ""])


@settings(max_examples=60)
@given(
    before=st.dictionaries(KEYS, VALUES, max_size=3),
    rows=st.lists(st.dictionaries(KEYS, VALUES, max_size=3), min_size=1, max_size=4),
    after=st.dictionaries(KEYS.map("{}2".format), VALUES, max_size=2),
    plain=st.booleans(),
    indent=st.sampled_from([None, 0, 1]),
)
def test_objects_in_a_list_are_those_that_json_finds(tmp_path_factory, before, rows, after, plain, indent):
    content = {**before, "data": rows, **after}
    text = json.dumps(content, ensure_ascii=plain, indent=indent)
    path = tmp_path_factory.getbasetemp() / "objects.json"
    path.write_bytes(text.encode())
    found = rows_under(path, "data", "data.path")
    assert [found[index] for index in range(len(found))] == rows


def test_an_unknown_task_is_answered_with_near_names():
    with pytest.raises(ConfigError, match=r"task: got 'docvq', expected one of ai2d, .*Fix: task=docvqa"):
        read_task("docvq")


def test_a_folder_without_the_files_says_what_was_looked_for(tmp_path):
    for name in FOLDERS:
        with pytest.raises(ConfigError, match=f"where no files of {name} were found, expected .*parquet"):
            build_questions(read_task(name), tmp_path)
    with pytest.raises(ConfigError, match=r"val_v1.0_withQT.json or DocVQA/validation-\*.parquet, there or in a"):
        build_questions(read_task("docvqa"), tmp_path)
    folders.docvqa(tmp_path)
    with pytest.raises(ConfigError, match=r"expected test_v1.0_withQT.json or DocVQA/test-\*.parquet"):
        build_questions(replace(read_task("docvqa"), split="test"), tmp_path)
    with pytest.raises(ConfigError, match="nowhere, which is no folder"):
        build_questions(read_task("docvqa"), tmp_path / "nowhere")


@pytest.mark.parametrize("place", ["", "spdocvqa_qas/", "val/"])
def test_other_places_of_the_same_files(tmp_path, place):
    folders.docvqa(tmp_path, place, "val/documents" if place == "val/" else "spdocvqa_images")
    assert len(read("docvqa", tmp_path)) == 3


def test_missing_images_are_counted_and_named_before_anything_is_asked(tmp_path):
    folders.docvqa(tmp_path)
    names = [f"p{n}.png" for n in range(5)]
    rows = [folders.DOCVQA, *({**folders.DOCVQA, "image": f"documents/{name}"} for name in names)]
    folders.write_json(tmp_path / "val_v1.0_withQT.json", {"data": rows})
    shown = ", ".join(f"documents/{name}" for name in names[:3])
    message = rf"documents, where 5 images of docvqa cannot be found: {shown}, \.\.\.,.*unpack the images"
    with pytest.raises(ConfigError, match=message):
        check_folder(read_task("docvqa"), tmp_path)
    questions = build_questions(read_task("docvqa"), tmp_path)
    assert questions[0].references
    with pytest.raises(BadRecord, match=r"documents/p0.png: no such image"):
        questions[1]
    folders.write_json(tmp_path / "val_v1.0_withQT.json", {"data": rows[:2]})
    with pytest.raises(ConfigError, match="where 1 image of docvqa cannot be found: documents/p0.png, expected"):
        check_folder(read_task("docvqa"), tmp_path)
    folders.write_json(tmp_path / "val_v1.0_withQT.json", {"data": rows})
    (tmp_path / "documents/xnbl0037_1.png").unlink()
    with pytest.raises(ConfigError, match="6 images of docvqa cannot be found"):
        check_folder(read_task("docvqa"), tmp_path)


def test_a_folder_without_images_says_where_they_belong(tmp_path):
    folders.textvqa(tmp_path)
    (tmp_path / "train_images").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="without images, expected a folder of images there: .*train_images"):
        build_questions(read_task("textvqa"), tmp_path)
    (tmp_path / "train_images").symlink_to(tmp_path / "elsewhere")
    assert len(read("textvqa", tmp_path)) == 1


def test_a_missing_part_of_a_parquet_release_is_named(tmp_path):
    folders.docvqa_parquet(tmp_path)
    (tmp_path / "DocVQA/validation-00000-of-00002.parquet").unlink()
    with pytest.raises(ConfigError, match="without validation-00000-of-00002, of which 1 parts are missing"):
        build_questions(read_task("docvqa"), tmp_path)


def test_a_pointer_in_place_of_a_file_is_recognised(tmp_path):
    path = tmp_path / "data/test-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ConfigError, match="a Git LFS pointer .*Fix: git -C .*/data lfs pull"):
        build_questions(read_task("realworldqa"), tmp_path)


def test_a_split_without_answers_is_refused_before_it_is_asked(tmp_path):
    rows = [{**folders.MMMU, "answer": "?", "id": f"test_Math_{n}"} for n in range(3)]
    folders.write_parquet(tmp_path / "Math/test-00000-of-00001.parquet", rows)
    with pytest.raises(ConfigError, match="none can be asked .*the split test was published without answers"):
        check_folder(replace(read_task("mmmu"), split="test"), tmp_path)
    folders.write_parquet(tmp_path / "other/data/test-00000-of-00001.parquet", [{"image": folders.stored(), "q": "?"}])
    with pytest.raises(ConfigError, match="none can be asked .*no `query` or `question`"):
        check_folder(read_task("chartqa"), tmp_path / "other")


@pytest.mark.parametrize("image", ["../secret.png", "/etc/passwd", "a\0b"])
def test_an_image_outside_the_folder_is_not_read(tmp_path, image):
    folders.chartqa(tmp_path)
    folders.write_image(tmp_path / "ChartQA Dataset/test/secret.png")
    row = {"imgname": image, "query": "What?", "label": "1"}
    folders.write_json(tmp_path / "ChartQA Dataset/test/test_human.json", [row])
    with pytest.raises(BadRecord, match="leaves the data folder|NUL"):
        build_questions(read_task("chartqa"), tmp_path)[0]


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("mmmu", {"options": "[__import__('os').getcwd()]"}, "is no list of texts"),
        ("mmmu", {"options": "['a', 'b'"}, "is no list of texts"),
        ("mmmu", {"options": str(["x"] * 27)}, "27 options"),
        ("docvqa", {"question": None}, "no `question`"),
        ("docvqa", {"image": "https://x.org/a.png"}, "is a URL"),
        ("docvqa", {"answers": []}, "no answer"),
        ("ai2d", {"answer": "2"}, "'2' is no number of one of 2 options"),
        ("gsm8k", {"answer": "4"}, "no line `#### NUMBER`"),
        ("mmlu", {"answer": 4}, "'4' is none of 4 options"),
        ("vqav2", {"answers": ["down"]}, "expected a list of objects"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, changes, reason):
    rows = {"mmmu": folders.MMMU, "docvqa": folders.DOCVQA | {"image": folders.stored()}, "gsm8k": folders.GSM8K}
    rows |= {"mmlu": folders.MMLU, "vqav2": {**folders.VQAV2, **folders.VQAV2_ANSWERS, "image": folders.stored()}}
    rows["ai2d"] = {"question": "What?", "options": ["ears", "nose"], "answer": "1", "image": folders.stored()}
    task = read_task(name)
    release = LAYOUTS[task.layout][-1]
    question_of(release.ask(rows[name], "row", tmp_path), task)
    with pytest.raises(BadRecord, match=re.escape(reason)):
        question_of(release.ask(rows[name] | changes, "row", tmp_path), task)


def test_one_folder_for_all_tasks_or_one_for_each(tmp_path):
    folders.docvqa(tmp_path / "DocVQA")
    task = read_task("docvqa")
    assert folder_of(task, tmp_path) == tmp_path / "DocVQA"
    assert folder_of(task, tmp_path / "DocVQA") == tmp_path / "DocVQA"
    assert folder_of(read_task("chartqa"), tmp_path) == tmp_path
    with pytest.raises(ConfigError, match="which is no folder"):
        folder_of(task, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "prompt",
    [
        "{question",
        "{questions}",
        "Answer.",
        "{question} {0}",
        "{question} {question.x}",
        "{question:{x}}",
        "{question!r}",
    ],
)
def test_a_prompt_that_cannot_be_filled_in_is_refused(prompt):
    values = {"name": "a", "layout": "gsm8k", "split": "test", "metric": "gsm8k", "max_new_tokens": 1}
    assert from_mapping(TaskConfig, values | {"prompt": "{{x}} {question}"})
    with pytest.raises(ConfigError, match="prompt: .*expected a text with {question}"):
        from_mapping(TaskConfig, values | {"prompt": prompt})
