"""Scores files of answers: the part of launch/evaluate.py that needs no model. Imports no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvlm.config.values import problem
from nvlm.metrics.answers import Answers, read_answers
from nvlm.metrics.intervals import Interval, bootstrap, paired
from nvlm.metrics.line import Line
from nvlm.metrics.registry import METRICS, scored, unread
from nvlm.processes.workers import report
from nvlm.runs.files import write_whole
from nvlm.runs.place import split_paths

KEYS = ("answers", "metric")


def scores_files(arguments: Sequence[str]) -> bool:
    """Whether the words ask for the scores of answer files, instead of an evaluation of a checkpoint."""
    return any(word.partition("=")[0].lstrip("+") == "answers" for word in arguments)


def score(arguments: Sequence[str]) -> int:
    """Score the files of `answers=A[,B] metric=NAME`: print the means, write each line's score beside its file, and
    compare two files on the questions that both have. Returns the exit status; raises ConfigError."""
    metric, paths = _words(arguments)
    found = [read_answers(path, metric) for path in paths]
    shared = _shared(*found) if len(found) == 2 else ()
    scores = [scored(metric, answers.lines) for answers in found]
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    for answers, values in zip(found, scores):
        console.print(_table(answers, values, metric))
        written = _write(answers, values, metric)
        console.print(f"The score of each line: {written}", markup=False)
        for remark in _remarks(answers, metric):
            report(f"note: {remark}")
    if shared:
        console.print(_comparison(found, scores, shared, metric))
    return 0


def _words(arguments: Sequence[str]) -> tuple[str, list[Path]]:
    """The metric and the one or two files."""
    words = dict(word.partition("=")[::2] for word in arguments)
    if unknown := [key for key in words if key not in KEYS]:
        raise problem(unknown[0], "an unknown key", "answers=FILE metric=NAME", f"leave out {unknown[0]}")
    files = split_paths(words["answers"], os.path.exists)
    if not 1 <= len(files) <= 2:
        raise problem("answers", f"{len(files)} files", "one, or two to compare", "answers=FILE or answers=FILE,FILE")
    names, metric = ", ".join(METRICS), words.get("metric")
    if metric not in METRICS:
        close = get_close_matches(metric or "", METRICS, n=1, cutoff=0.3) or ["exact_match"]
        raise problem("metric", metric or "nothing", f"one of {names}", f"metric={close[0]}")
    return metric, [Path(name) for name in files]


def _shared(first: Answers, second: Answers) -> list[tuple[Line, Line]]:
    """The lines of the questions that both files have, in the order of the first."""
    others = {line.id: line for line in second.lines}
    found = [(line, others[line.id]) for line in first.lines if line.id in others]
    if not found:
        got = f"no common id in {first.path} and {second.path}"
        raise problem("answers", got, "two files of the same questions", f"answers={first.path} for one of them")
    for one, other in found:
        if one.reason or other.reason:  # a question that could not be asked has no references
            continue
        if (one.references, one.options) != (other.references, other.options):
            got = f"different references or options for id {one.id!r} in {first.path} and {second.path}"
            raise problem("answers", got, "two files of the same questions", f"answers={first.path} for one of them")
    return found


def _table(answers: Answers, scores: Sequence[float], metric: str) -> Table:
    """Means in percent, of all lines and by category."""
    table = Table(title=Text(_plain(f"{answers.path}: {metric}")), title_justify="left")
    for heading in ("category", "mean, %", "95% interval", "questions"):
        table.add_column(heading, justify="left" if heading == "category" else "right")
    table.add_row("all", *_row(bootstrap(scores)))
    by_category: dict[str, list[float]] = {}
    for line, value in zip(answers.lines, scores):
        by_category.setdefault(line.category, []).append(value)
    if set(by_category) != {""}:
        for category, values in sorted(by_category.items()):
            table.add_row(Text(_plain(category) or "(none)"), *_row(bootstrap(values)))
    return table


def _row(found: Interval) -> tuple[str, str, str]:
    return f"{100 * found.mean:.2f}", f"{100 * found.low:.2f} to {100 * found.high:.2f}", f"{found.count:,}"


def _comparison(
    found: Sequence[Answers], scores: Sequence[Sequence[float]], shared: Sequence[tuple[Line, Line]], metric: str
) -> Table:
    """The second file against the first, on the questions that both have."""
    if all(len(answers.lines) == len(shared) for answers in found):
        by_id = [dict(zip((line.id for line in answers.lines), values)) for answers, values in zip(found, scores)]
        before, after = ([values[line.id] for line, _ in shared] for values in by_id)
    else:  # scored once more, because a score may depend on the other lines
        before, after = (scored(metric, lines) for lines in zip(*shared))
    gap = paired(after, before)
    table = Table(title=Text(_plain(f"{found[1].path} minus {found[0].path}")), title_justify="left")
    for heading in ("questions", "difference, %", "95% interval", "better", "worse", "p (sign test)"):
        table.add_column(heading, justify="right", no_wrap=True)
    interval = f"{100 * gap.low:+.2f} to {100 * gap.high:+.2f}"
    counts = (f"{gap.better:,}", f"{gap.worse:,}", f"{gap.p:.3g}")
    table.add_row(f"{len(shared):,}", f"{100 * gap.mean:+.2f}", interval, *counts)
    return table


def _remarks(answers: Answers, metric: str) -> list[str]:
    """What a reader of the mean must know."""
    remarks = []
    if answers.cut:
        remarks.append(
            f"{answers.path}, line {answers.cut}, breaks off: it was left out, and the lines before it scored"
        )
    if count := sum(unread(metric, line) for line in answers.lines):
        what = "a random option was scored" if metric == "mmmu" else "they count as wrong"
        remarks.append(f"{answers.path}: texts in which {metric} found no answer: {count:,}; {what}")
    if count := sum(bool(line.reason) for line in answers.lines):
        remarks.append(f"{answers.path}: questions that could not be asked, which score 0: {count:,}")
    return remarks


def _write(answers: Answers, scores: Sequence[float], metric: str) -> Path:
    """Writes FILE.scores.jsonl: id, score, and whether the metric found no answer."""
    path = answers.path.with_name(f"{answers.path.name.removesuffix('.jsonl')}.scores.jsonl")
    rows = [{"id": line.id, "score": value} for line, value in zip(answers.lines, scores)]
    for row, line in zip(rows, answers.lines):
        if unread(metric, line):
            row["unread"] = True
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def _plain(text: str) -> str:
    """`text` for a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
