"""Exact match on held-out questions, in total and by kind of question, and the run's report page."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nvlm import parallel, registry
from nvlm.arch.stages import Stages
from nvlm.batch import BadRecord
from nvlm.config import Config
from nvlm.data.chat import first_question
from nvlm.data.encode import build_encoder, encode
from nvlm.data.sources import Records, answers
from nvlm.evaluate.answer import answer
from nvlm.evaluate.report import Shown, write_report
from nvlm.vision.balance import BalancedVision


@dataclass(frozen=True, slots=True)
class Score:
    """Share of questions answered exactly, in total and by kind."""

    exact_match: float
    by_kind: dict[str, float]
    questions: int


def evaluate(
    stages: Stages,
    vision: BalancedVision,
    records: Records,
    config: Config,
    run_dir: Path,
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
) -> Score:
    """Answer the held-out `records` with exact tiles; writes heldout.json, answers.jsonl and report.html.

    `alive` is called before each batch.
    """
    # Evaluation resizes exactly, whatever training does.
    encoder = build_encoder(config, registry.layout_rule(config.arch.name), resize="exact")
    rank, size = parallel.data_rank()
    rows, shown = [], []
    mine = range(min(config.evaluate.questions, len(records)))[rank::size]
    for start in range(0, len(mine), config.evaluate.batch):
        alive()
        chosen = []
        for index in mine[start : start + config.evaluate.batch]:
            try:
                record = records[index]
                chosen.append((index, record, encode(first_question(record), encoder, generate=True)))
            except BadRecord as reason:  # counted as wrong: a score must not rise by what could not be read
                lost = {"id": records.name(index), "kind": "unreadable", "answer": "", "expected": str(reason)}
                rows.append(lost | {"right": False})
        if not chosen:
            continue
        got = answer(
            stages,
            vision.within_replica(),  # replicas may have different numbers of batches
            [sample for _, _, sample in chosen],
            encoder.tokenizer,
            config.evaluate.max_new_tokens,
            device,
            config.vision.tile_size,
            config.row_multiple,
        )
        for (index, record, _), text in zip(chosen, got):
            expected = answers(record.messages)
            kind = records.kind(index)
            rows.append(
                {
                    "id": record.id,
                    "kind": kind,
                    "answer": text,
                    "expected": expected,
                    "right": text == expected,
                }
            )
            if len(shown) < config.evaluate.gallery:
                shown.append(Shown(record, text, expected))
    rows = parallel.gather_over_data(rows)
    score = _score(rows)
    if parallel.is_first_rank():
        (run_dir / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run_dir / "heldout.json").write_text(
            json.dumps({"exact_match": score.exact_match, "by_kind": score.by_kind, "questions": score.questions})
        )
        write_report(run_dir, config, shown, score.exact_match, score.by_kind, encoder)
    return score


def _score(rows: list[dict]) -> Score:
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row["right"])
    right = sum(row["right"] for row in rows)
    means = {kind: sum(marks) / len(marks) for kind, marks in sorted(by_kind.items())}
    return Score(right / max(len(rows), 1), means, len(rows))
