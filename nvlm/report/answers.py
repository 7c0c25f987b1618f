"""The evaluations of a run: the answers of its last step, the scores of all. Files are checked, not trusted."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvlm.metrics.intervals import Interval

ANSWERS, SCORE = "answers.jsonl", "score.json"
_LARGEST = 200_000_000  # bytes of a file of answers
_LONGEST = 2_000  # characters of a text


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A line of answers.jsonl. `tiles`: regular tiles of its images in all; None: not written."""

    id: str
    question: str
    answer: str
    references: tuple[str, ...]
    score: float
    category: str
    tiles: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The scores of a task at a step. `by_category`: as the evaluation computed them; `answers`: of the last step only,
    by id."""

    task: str
    metric: str
    step: int
    overall: Interval
    by_category: Mapping[str, Interval]
    answers: Mapping[str, Answer]


def read_evaluations(run_dir: Path) -> tuple[tuple[Evaluation, ...], tuple[str, ...]]:
    """The finished evaluations in a run's folder, by task and step, and what is wrong with the others."""
    found, faults = [], []
    for task in sorted((run_dir / "evaluation").glob("*/")):
        steps = sorted(_steps(task).items())
        scored = [(step, folder) for step, folder in steps if (folder / SCORE).is_file()]
        faults += [
            f"{task.name}: the evaluation at step {s} has not ended" for s, folder in steps if (s, folder) not in scored
        ]
        for step, folder in scored:
            try:
                found.append(_evaluation(task.name, step, folder, last=folder == scored[-1][1]))
            except (
                OSError,
                ValueError,
                TypeError,
                LookupError,
                AttributeError,
                OverflowError,
                RecursionError,
            ) as error:
                faults.append(f"{task.name}: the evaluation at step {step} cannot be read ({_reason(error)})")
    return tuple(found), tuple(faults)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _steps(task: Path) -> dict[int, Path]:
    names = {folder: re.fullmatch(r"step_(\d{1,12})", folder.name) for folder in task.glob("step_*/")}
    return {int(name[1]): folder for folder, name in names.items() if name}


def _evaluation(task: str, step: int, folder: Path, last: bool) -> Evaluation:
    score = json.loads((folder / SCORE).read_text("utf-8"))
    answers = read_answers(folder / ANSWERS) if last else {}
    overall = _interval(score)
    if last and len(answers) != overall.count:
        raise ValueError(f"{ANSWERS} has {len(answers)} answers, {SCORE} counts {overall.count}")
    return Evaluation(
        task=task,
        metric=str(score["metric"]),
        step=step,
        overall=overall,
        by_category={str(name): _interval(one) for name, one in score.get("by_category", {}).items()},
        answers=answers,
    )


def _interval(values: Mapping) -> Interval:
    mean, low, high = (float(values[name]) for name in ("mean", "low", "high"))
    if not all(map(math.isfinite, (mean, low, high))):
        raise ValueError("a score that is not finite")
    return Interval(mean=mean, low=low, high=high, count=int(values["count"]))


def read_answers(path: Path) -> dict[str, Answer]:
    """The answers in a file by id; where records share an id, those after the first by "ID (2)" and so on. Raises
    ValueError for a line that is no answer, and for a file that is too large."""
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path.name} has more than {_LARGEST:,} bytes")
    with open(path, encoding="utf-8") as file:
        answers = [_answer(json.loads(line)) for line in file if line.strip()]
    seen: Counter[str] = Counter()
    found = {}
    for answer in answers:
        seen[answer.id] += 1
        found[answer.id if seen[answer.id] == 1 else f"{answer.id} ({seen[answer.id]})"] = answer
    return found


def _answer(row: Mapping) -> Answer:
    score, tiles = float(row["score"]), row.get("tiles")
    if not math.isfinite(score):
        raise ValueError("a score that is not finite")
    return Answer(
        id=str(row["id"])[:_LONGEST],
        question=str(row.get("question") or "").strip()[:_LONGEST],
        answer=str(row["answer"])[:_LONGEST],
        references=tuple(str(one)[:_LONGEST] for one in row.get("references") or ()),
        score=score,
        category=str(row.get("category") or ""),
        tiles=tiles if isinstance(tiles, int) and not isinstance(tiles, bool) and tiles >= 0 else None,
    )
