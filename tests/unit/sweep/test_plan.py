"""What a sweep refuses before it starts, and what it has already done."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from nvlm.config.values import ConfigError
from nvlm.runs.ownership import begin
from nvlm.sweep import ledger
from nvlm.sweep.ledger import Row
from nvlm.sweep.plan import Cell, check_distinct, check_folders, check_names, first_rows, is_done, other_rows


@pytest.fixture
def cell(configured):
    def make(folder="a", *overrides):
        return Cell(folder, overrides, configured("resume=auto", "train.threads=1", *overrides))

    return make


def finish(where, cell, step=None):
    """A run folder as after the last step (or `step`) of `cell`."""
    folder = where / cell.folder
    begin(cell.config, folder, fresh=True)
    name = f"step_{step or cell.config.train.steps}"
    (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text(name)


def done(cell):
    return Row(folder=cell.folder, status="done", seconds=5.0)


def test_runs_that_clash_are_refused(cell):
    check_names(["a", "b"])
    with pytest.raises(ConfigError, match="two runs for the folder b, expected a folder for each run. Fix: "):
        check_names(["a", "b", "b"])
    check_distinct([cell("a"), cell("b", "seed=2")])
    with pytest.raises(ConfigError, match="a and b, which have the same configuration"):
        check_distinct([cell("a"), cell("b", "tiling=1d")])


def test_what_is_done_is_passed_over_and_the_rest_is_not(cell, tmp_path):
    one = cell()
    assert not is_done(one, done(one), tmp_path)  # its folder was deleted
    finish(tmp_path, one)
    assert is_done(one, done(one), tmp_path)
    assert not is_done(one, None, tmp_path)  # trained, but nothing says that it was evaluated
    for status in ("failed", "running", "waiting"):
        assert not is_done(one, dataclasses.replace(done(one), status=status), tmp_path)
    assert is_done(cell("a", "train.threads=2", "train.keep=5"), done(one), tmp_path)
    assert not is_done(cell("a", "evaluate.questions=7"), done(one), tmp_path)  # to be evaluated again
    assert not is_done(cell("a", "train.steps=5000"), done(one), tmp_path)  # to be extended


def test_a_changed_configuration_is_refused_with_all_its_keys(cell, tmp_path):
    before = [cell("a"), cell("b", "seed=2")]
    for one in before:
        finish(tmp_path, one, step=3)
    check_folders([*before, cell("new", "seed=3")], tmp_path)
    changed = [cell("a", "optim.lr=0.5", "train.micro_batch=4"), cell("b", "seed=2", "optim.lr=0.5")]
    with pytest.raises(ConfigError) as caught:
        check_folders(changed, tmp_path)
    text = str(caught.value)
    assert re.search(r"/a: train.micro_batch, optim.lr|/a: optim.lr, train.micro_batch", text)
    assert "optim.lr=0.003" in text and "train.micro_batch=32" in text and "2 of the 2 runs" in text
    with pytest.raises(ConfigError, match="/a: arch.name: got decoder, expected hybrid"):
        check_folders([cell("a", "arch=decoder")], tmp_path)


def test_the_first_rows_keep_what_is_known(cell, tmp_path):
    cells = [cell("a"), cell("b", "seed=2")]
    finish(tmp_path, cells[0])
    known = {
        "a": done(cells[0]),
        "b": Row(folder="b", status="failed", reason="loss nan", seconds=3.0),
        "other": Row(folder="other", status="done", seconds=1.0),
        "killed": Row(folder="killed", status="running"),
    }
    b = Row(folder="b", overrides=("seed=2",), status="waiting", seconds=3.0)
    assert first_rows(cells, known, tmp_path) == {"a": known["a"], "b": b}
    killed = Row(folder="killed", status="waiting")
    assert other_rows(cells, known) == {"other": known["other"], "killed": killed}


def test_the_ledger_as_a_file(tmp_path):
    row = Row(folder="seed=1", overrides=("seed=1",), status="failed", reason="loss nan", seconds=2.5)
    ledger.write(tmp_path, "python launch/train.py -m seed=1,2", {"seed=1": row})
    assert ledger.read(tmp_path) == {"seed=1": row}
    assert json.loads((tmp_path / "sweep.json").read_text()) == {
        "command": "python launch/train.py -m seed=1,2",
        "runs": [
            {"folder": "seed=1", "overrides": ["seed=1"], "status": "failed", "reason": "loss nan", "seconds": 2.5}
        ],
    }


@pytest.mark.parametrize("text", ["", "{", "[]", '{"runs": [1]}', '{"runs": [{"folder": "a", "status": "odd"}]}'])
def test_a_damaged_ledger_counts_as_none(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    assert ledger.read(tmp_path) == {}
