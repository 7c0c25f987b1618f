"""Answer files scored from the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from nvlm.commands.evaluate import main

ROWS = [
    {"id": 1, "answer": "two", "references": ["2", "two"], "category": "number"},
    {"id": "b", "answer": "cat", "references": "dog", "category": "animal", "tiles": 7},
    {"id": "c", "answer": "dog", "references": ["dog"], "category": "animal"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_scored_and_each_line_beside_it(tmp_path, capsys):
    path = write(tmp_path / "answers.jsonl", ROWS)
    assert main([f"answers={path}", "metric=exact_match"]) == 0
    out = capsys.readouterr().out
    assert "66.67" in out and "100.00 to 100.00" in out
    scores = [json.loads(line) for line in (tmp_path / "answers.scores.jsonl").read_text().splitlines()]
    assert scores == [{"id": "1", "score": 1.0}, {"id": "b", "score": 0.0}, {"id": "c", "score": 1.0}]


def test_two_files_are_compared_on_the_questions_that_both_have(tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", ROWS)
    second = write(tmp_path / "b.jsonl", [{**ROWS[1], "answer": "dog"}, {**ROWS[0], "answer": "2"}])
    assert main([f"answers={first},{second}", "metric=exact_match"]) == 0
    row = [line for line in capsys.readouterr().out.splitlines() if "+50.00" in line][0]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["2", "+50.00", "+0.00 to +100.00", "1", "0", "1"]


def test_runs_of_a_sweep_are_compared_though_one_could_not_read_an_image(tmp_path, capsys):
    """Their folders have commas in their names."""
    folders = [tmp_path / f"arch={arch},seed=1" for arch in ("decoder", "xattn")]
    broken = {**ROWS[0], "answer": "", "references": [], "reason": "broken image"}
    for folder, rows in zip(folders, (ROWS, [broken, *ROWS[1:]])):
        folder.mkdir()
        write(folder / "answers.jsonl", rows)
    assert main([f"answers={folders[0]}/answers.jsonl,{folders[1]}/answers.jsonl", "metric=exact_match"]) == 0
    assert "-33.33" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["metric=vqa"], "metric: got vqa, expected one of .*Fix: metric=vqa_accuracy"),
        ([], "metric: got nothing"),
        (["metric=anls", "task=docvqa"], "task: got an unknown key"),
    ],
)
def test_wrong_words_are_refused(tmp_path, words, message, capsys):
    path = write(tmp_path / "answers.jsonl", ROWS)
    assert main([f"answers={path}", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_two_files_must_be_of_the_same_questions(tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", ROWS)
    other = write(tmp_path / "b.jsonl", [{**ROWS[0], "id": "x"}])
    assert main([f"answers={first},{other}", "metric=anls"]) == 2
    assert "no common id" in capsys.readouterr().err
    changed = write(tmp_path / "c.jsonl", [{**ROWS[1], "references": ["cat"]}])
    assert main([f"answers={first},{changed}", "metric=anls"]) == 2
    assert "different references or options for id 'b'" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.scores.jsonl"))


def test_what_a_reader_of_the_mean_must_know_is_said(tmp_path, capsys):
    rows = [
        {"id": 1, "answer": "hm", "references": ["A"], "options": ["cat", "dog"]},
        {"id": 2, "answer": "", "references": [], "reason": "no image", "category": "unreadable"},
    ]
    path = write(tmp_path / "answers.jsonl", rows)
    with open(path, "a") as file:
        file.write('{"id": 3, "answ')
    assert main([f"answers={path}", "metric=mmmu"]) == 0
    notes = capsys.readouterr().err
    assert "line 3, breaks off" in notes and "no answer: 1; a random option" in notes and "score 0: 1" in notes
    scores = [json.loads(line) for line in (tmp_path / "answers.scores.jsonl").read_text().splitlines()]
    assert scores[0]["unread"] and scores[1] == {"id": "2", "score": 0.0}


def test_texts_of_a_file_cannot_write_to_the_terminal(tmp_path, capsys):
    path = write(tmp_path / "answers.jsonl", [{**ROWS[0], "category": "\x1b[31m[bold]red\ud800"}])
    assert main([f"answers={path}", "metric=exact_match"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[31m[bold]red" in out


def test_files_are_scored_without_torch(tmp_path):
    path = write(tmp_path / "answers.jsonl", ROWS)
    code = (
        "import sys; from nvlm.commands.evaluate import main\n"
        f"assert main(['answers={path}', 'metric=cider']) == 0\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
