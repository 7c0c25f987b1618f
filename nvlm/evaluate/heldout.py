"""Exact match on held-out questions, in total and by kind of question, and the run's report page."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nvlm.arch import registry
from nvlm.arch.pipeline import Pipeline
from nvlm.config.values import Config
from nvlm.data.batch import Sample
from nvlm.data.messages import NoAnswer, first_question, read_turns
from nvlm.data.outline import Processor, build_processor, outline
from nvlm.data.record import BadRecord, one_record
from nvlm.data.samples import fill
from nvlm.data.sources.registry import Records
from nvlm.data.text.chat import answer_ids
from nvlm.evaluate.answer import answer
from nvlm.evaluate.losses import read_losses
from nvlm.evaluate.report import Shown, draw_pictures, write_report
from nvlm.generate.text import words
from nvlm.processes import groups
from nvlm.runs.files import write_whole
from nvlm.runs.sinks import spared
from nvlm.tiling.grid import TilePlan
from nvlm.vision.prepass import BalancedVision

_UNREADABLE = "unreadable"  # the kind of a question whose record cannot be read


@dataclass(frozen=True, slots=True)
class Score:
    """Share of questions answered exactly, in total and by kind. `unanswered`: records without a reference answer; they
    do not count among the `questions`."""

    exact_match: float
    by_kind: dict[str, float]
    questions: int
    unanswered: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Asked:
    """A held-out question, tokenized. `expected`: its answer after a round trip through the tokenizer, which is what a
    model can produce."""

    id: str
    kind: str
    question: str
    expected: str
    plans: tuple[TilePlan, ...]
    sample: Sample


def evaluate(
    pipeline: Pipeline,
    vision: BalancedVision,
    records: Records,
    config: Config,
    run_dir: Path,
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
) -> Score:
    """Answer the held-out `records` with exact tiles; writes heldout.json, answers.jsonl and report.html.

    A record that cannot be read counts as wrong, so that it cannot raise the score. One without a reference answer is
    named but not scored. `alive` is called before each batch.
    """
    # Evaluation resizes exactly, whatever the setting in training.
    processor = build_processor(config, registry.placement_rule(config.arch.name), resize="exact")
    rank, size = groups.data_rank()
    rows, shown, unanswered = [], [], []
    mine = range(min(config.evaluate.questions, len(records)))[rank::size]
    for start in range(0, len(mine), config.evaluate.batch):
        alive()
        chosen: list[_Asked] = []
        for index in mine[start : start + config.evaluate.batch]:
            try:
                with one_record():
                    chosen.append(_ask(records, index, processor))
            except NoAnswer:
                unanswered.append(records.name(index))
            except BadRecord as reason:
                rows.append(_row(records.name(index), _UNREADABLE, "", str(reason)) | {"right": False})
        if not chosen:
            continue
        got = answer(
            pipeline,
            vision.within_replica(),  # replicas may have different numbers of batches
            [asked.sample for asked in chosen],
            processor.tokenizer,
            config.evaluate.max_new_tokens,
            device,
            config.vision.tile_size,
            config.row_multiple,
        )
        rows += [_row(asked.id, asked.kind, text, asked.expected) for asked, text in zip(chosen, got)]
        room = config.evaluate.gallery - len(shown)
        shown += [_shown(asked, text, processor) for asked, text in zip(chosen[:room], got)]
    rows = groups.gather_over_data(rows)
    score = _score(rows, groups.gather_over_data(unanswered))
    if groups.is_first_rank():
        with spared(f"{run_dir}: the evaluation's files"):
            _write(score, rows, run_dir)
            write_report(run_dir, config, shown, score.exact_match, score.by_kind, read_losses(run_dir))
    return score


def _write(score: Score, rows: Sequence[dict], run_dir: Path) -> None:
    for stale in ("answers.jsonl", "heldout.json", "report.html"):  # so that no older score remains if the disk is full
        (run_dir / stale).unlink(missing_ok=True)
    write_whole(run_dir / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(run_dir / "heldout.json", json.dumps(asdict(score) | {"unanswered": len(score.unanswered)}))


def _ask(records: Records, index: int, processor: Processor) -> _Asked:
    record, expected = first_question(records[index])
    sketch = outline(record, processor, generate=True)
    expected = words(answer_ids(expected, processor.tokenizer), processor.tokenizer)
    question, sample = "".join(read_turns(record.messages)[-1].texts), fill(record, sketch, processor)
    return _Asked(record.id, records.kind(index), question, expected, sketch.pictures.plans, sample)


def _shown(asked: _Asked, text: str, processor: Processor) -> Shown:
    pictures = draw_pictures(asked.plans, asked.sample.pixels, processor)
    return Shown(asked.question, pictures, text, asked.expected)


def _row(name: str, kind: str, text: str, expected: str) -> dict:
    return {"id": name, "kind": kind, "answer": text, "expected": expected, "right": text == expected}


def _score(rows: Sequence[dict], unanswered: Sequence[str]) -> Score:
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row["right"])
    right = sum(row["right"] for row in rows)
    means = {kind: sum(marks) / len(marks) for kind, marks in sorted(by_kind.items())}
    return Score(right / max(len(rows), 1), means, len(rows), tuple(unanswered))
