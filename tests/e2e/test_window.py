"""Windows of steps in real runs: resumed within a window or shared by two replicas, they train on the same rows."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.e2e.runs import losses, rows, train

WINDOW = (
    "data=jsonl",
    "data.path=r.jsonl",
    "data.window=4",
    "data.row_length=160",
    "train.save_every=2",
    "train.keep=3",
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of six steps whose last window is cut short by its end; two of thirty images are broken."""
    where = tmp_path_factory.mktemp("window")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(30):
        size = rng.integers(80, 400, 2)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(where / f"{i}.jpg")
        question = {"role": "user", "content": "so " * int(rng.integers(1, 30))}
        lines.append({"messages": [question, {"role": "assistant", "content": str(i)}], "images": [f"{i}.jpg"]})
    (where / "3.jpg").unlink()
    (where / "7.jpg").write_bytes((where / "7.jpg").read_bytes()[:3000])
    (where / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(where, "name=whole", *WINDOW)
    return where


def skipped(where, name):
    lines = (where / "runs" / name / "skipped.jsonl").read_text().splitlines()
    return sorted(json.loads(line)["record"] for line in lines)


def test_two_replicas_train_on_the_rows_of_one(unbroken):
    train(unbroken, "name=two", "parallel.data=2", "data.workers=1", *WINDOW)
    one, two = (rows(unbroken / "runs" / name) for name in ("whole", "two"))
    for count in (
        "records",
        "skipped",
        "tokens",
        "tiles",
        "trained_tokens",
        "pairs",
        "keys",
        "cross_pairs",
        "projected",
    ):
        assert [row[count] for row in one] == [row[count] for row in two]
    assert sum(row["records"] for row in one) == 6 * 4
    assert losses(unbroken / "runs" / "two") == pytest.approx(losses(unbroken / "runs" / "whole"), rel=1e-4)
    assert skipped(unbroken, "two") == skipped(unbroken, "whole") != []


def test_a_run_goes_on_exactly_within_a_window(unbroken):
    run = unbroken / "runs" / "again"
    shutil.copytree(unbroken / "runs" / "whole", run)
    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    train(unbroken, "name=again", "resume=auto", *WINDOW)
    assert len(rows(run)) == 6
    assert losses(run) == losses(unbroken / "runs" / "whole")
