"""What an evaluation leaves: its answers by question and its score. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvlm.metrics import registry
from nvlm.metrics.intervals import Interval, bootstrap
from nvlm.metrics.line import Line
from nvlm.runs.files import write_whole

ANSWERS, SCORE = "answers.jsonl", "score.json"
UNREADABLE = "unreadable"  # the category of a question that cannot be asked

_RESULTS = ("answer", "score", "reason")

Row = dict[str, Any]
"""A line of answers.jsonl: id, question, answer, references, score, category; where they exist options, type, tiles
(regular tiles of its images, in all), reason (why it could not be asked)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The mean score of a task's questions, in all and by category. `checkpoint`: the step folder, "" if it was not
    saved; `unanswered`: questions without a reference, which do not count."""

    task: str
    metric: str
    step: int
    checkpoint: str
    whole: Interval
    by_category: dict[str, Interval]
    unanswered: int

    def plain(self) -> dict[str, Any]:
        """The content of score.json."""
        values = asdict(self)
        return values | values.pop("whole") | {"by_category": values.pop("by_category")}

    def line(self) -> str:
        """The score in one line."""
        whole = self.whole
        return f"{self.task} {self.metric}={whole.mean:.2f} [{whole.low:.2f}, {whole.high:.2f}]"


def told(score: Score, names: Sequence[str]) -> list[str]:
    """The scores by category, and `names`, those of the questions without a reference."""
    by_category = "  ".join(f"{name} {one.mean:.2f}" for name, one in score.by_category.items() if name)
    missing = f"not scored, no reference answer{unanswered(names)}" if names else ""
    return [line for line in (by_category, missing) if line]


def unanswered(names: Sequence[str], most: int = 5) -> str:
    """The number of `names` and the first of them, after a colon; empty if there are none."""
    more = ", ..." if len(names) > most else ""
    return f": {len(names)} ({', '.join(names[:most])}{more})" if names else ""


def folder_of(root: Path, task: str, step: int) -> Path:
    """The folder of the evaluation of `task` after `step` steps. `root`: a run's folder `evaluation`, or another."""
    return root / task / f"step_{step:08d}"


def scored(rows: Sequence[Row], metric: str) -> list[Row]:
    """`rows` with the score of each; one that could not be asked has 0, so that it cannot raise the mean."""
    scores = registry.scored(metric, [_line(row) for row in rows])
    return [row | {"score": score} for row, score in zip(rows, scores)]


def score_of(rows: Sequence[Row], task: str, metric: str, step: int, checkpoint: str, unanswered: int) -> Score:
    """The mean of scored `rows`, of which there must be some."""
    by_category = defaultdict(list)
    for row in rows:
        by_category[row["category"]].append(row["score"])
    return Score(
        task=task,
        metric=metric,
        step=step,
        checkpoint=checkpoint,
        whole=bootstrap([row["score"] for row in rows]),
        by_category={name: bootstrap(scores) for name, scores in sorted(by_category.items())},
        unanswered=unanswered,
    )


def digest(row: Mapping[str, Any]) -> str:
    """Identifies the question of `row`, whatever its answer."""
    question = {name: value for name, value in row.items() if name not in _RESULTS}
    return hashlib.blake2b(json.dumps(question, sort_keys=True).encode(), digest_size=16).hexdigest()


def write(folder: Path, rows: Sequence[Row], score: Score) -> None:
    """Write the answers and then the score into `folder`. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / ANSWERS, "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(folder / SCORE, json.dumps(score.plain(), indent=1) + "\n")


def _line(row: Mapping[str, Any]) -> Line:
    return Line(
        id=row["id"],
        answer=row["answer"],
        references=tuple(row["references"]),
        options=tuple(row.get("options", ())),
        type=row.get("type", ""),
        category=row["category"],
        reason=row.get("reason", ""),
    )
