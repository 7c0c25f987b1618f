"""The layouts by name, and the questions of a task in a folder of published files. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from nvlm.config.task import TaskConfig
from nvlm.config.values import problem
from nvlm.tasks.benchmark import FileQuestions, check
from nvlm.tasks.layouts import (
    ai2d,
    chartqa,
    docvqa,
    gsm8k,
    mathvista,
    mmlu,
    mmmu,
    ocrbench,
    realworldqa,
    textvqa,
    vqav2,
)
from nvlm.tasks.release import KEY, find

RECORDS = "records"  # the layout of a task whose questions are records of `data=`
LAYOUTS = {
    "ai2d": ai2d.RELEASES,
    "chartqa": chartqa.RELEASES,
    "docvqa": docvqa.RELEASES,
    "gsm8k": gsm8k.RELEASES,
    "mathvista": mathvista.RELEASES,
    "mmlu": mmlu.RELEASES,
    "mmmu": mmmu.RELEASES,
    "ocrbench": ocrbench.RELEASES,
    "realworldqa": realworldqa.RELEASES,
    "textvqa": textvqa.RELEASES,
    "vqav2": vqav2.RELEASES,
}


def build_questions(task: TaskConfig, folder: Path) -> FileQuestions:
    """The questions of a benchmark in `folder`. Raises ConfigError if its files are not there."""
    if task.layout not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise problem("layout", task.layout, f"a benchmark's layout: {known}", f"conf/task/{task.name}.yaml")
    found = find(LAYOUTS[task.layout], task.name, folder, task.split)
    return FileQuestions(task, found, found.release.rows(found.files, KEY))


def check_folder(task: TaskConfig, folder: Path) -> FileQuestions:
    """The same, once its first questions were read and its images were found to be there. Raises ConfigError."""
    questions = build_questions(task, folder)
    check(questions)
    return questions


def folder_of(task: TaskConfig, path: Path) -> Path:
    """Where the task's files are: in the folder within `path` that has its name, in any case, if there is one, else in
    `path` itself. Raises ConfigError if `path` is no folder."""
    if not path.is_dir():
        raise problem(KEY, f"{path}, which is no folder", f"the folder of {task.name}'s files", f"{KEY}=FOLDER")
    below = [entry for entry in sorted(path.iterdir()) if entry.name.lower() == task.name and entry.is_dir()]
    return below[0] if below else path
