"""Which runs share a cell, and what makes rows and columns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nvlm.config.mapping import to_mapping
from nvlm.report.cells import grid
from nvlm.report.compare import row_gaps
from nvlm.report.history import read_steps
from nvlm.report.runs import DONE, UNFINISHED, Run
from nvlm.report.settings import settings
from nvlm.runs.ownership import flat
from tests.sweep_folders import with_seed

STEPS, _ = read_steps(Path("nothing"), 1)


def run(config, seed=1, status=DONE, folder="run"):
    config = with_seed(config, seed)
    return Run(
        folder=Path(folder), config=config, values=flat(to_mapping(config)), steps=STEPS, evaluations=(), status=status,
        reason="", notes=(), overrides=None, commit=None,
    )  # fmt: skip


def places(found):
    return [(cell.row, cell.column, [one.config.seed for one in cell.runs]) for cell in found.cells]


def test_architectures_are_rows_and_tags_columns_in_the_paper_s_order(configured):
    words = [
        ("arch=hybrid", "tiling.tag=1d"),
        ("arch=hybrid", "tiling.max_tiles=1"),
        ("arch=decoder", "tiling.tag=none"),
    ]
    found = grid([run(configured(*one), seed) for one in words for seed in (2, 1)])
    assert (found.rows, found.columns) == (("NVLM-D", "NVLM-H"), ("one tile", "no tag", "1-D"))
    assert (found.base_row, found.base_column) == ("NVLM-D", "no tag")
    assert places(found) == [
        ("NVLM-D", "no tag", [1, 2]), ("NVLM-H", "one tile", [1, 2]), ("NVLM-H", "1-D", [1, 2])
    ]  # fmt: skip


def test_what_follows_from_the_architecture_is_no_axis(configured):
    """Lengths and steps differ between architectures, and bind_tags is NVLM-H's alone."""
    found = grid([run(configured("arch=decoder")), run(configured("arch=hybrid"))])
    assert (found.rows, found.columns) == (("NVLM-D", "NVLM-H"), ("",))
    keys = [one.key for one in settings(found)]
    assert "arch.name" in keys and "data.cross_length" in keys and "optim.lr" not in keys


@pytest.mark.parametrize(
    ("words", "rows", "columns"),
    [
        (["arch.bind_tags=ordered", "arch.bind_tags=none"], ("arch.bind_tags=none", "arch.bind_tags=ordered"), ("",)),
        (
            ["optim.lr=0.01", "optim.lr=0.001", "optim.lr=0.002"],
            tuple(f"optim.lr={x}" for x in (0.001, 0.002, 0.01)),
            ("",),
        ),
        (["train.threads=1", "train.threads=2"], ("NVLM-H",), ("",)),
    ],
)
def test_any_key_can_be_an_axis(configured, words, rows, columns):
    found = grid([run(configured("arch=hybrid", word), seed) for seed, word in enumerate(words)])
    assert (found.rows, found.columns) == (rows, columns)


def test_two_other_keys_make_rows_and_columns(configured):
    words = [("stage.train_llm=false", lr) for lr in ("optim.lr=0.001", "optim.lr=0.002")]
    words += [("stage.train_llm=true", lr) for lr in ("optim.lr=0.001", "optim.lr=0.002")]
    found = grid([run(configured("arch=xattn", *one)) for one in words])
    assert len(found.cells) == 4 and len(found.rows) == len(found.columns) == 2


def test_rows_of_two_axes_are_compared_in_one_of_them(configured):
    words = [(arch, f"stage.train_llm={learns}", tag) for arch in ("arch=xattn", "arch=hybrid")
             for learns in ("false", "true") for tag in ("tiling.tag=1d", "tiling.tag=none")]  # fmt: skip
    found = grid([run(configured(*one)) for one in words])
    assert len(found.rows) == 4 and found.columns == ("no tag", "1-D")
    scores = {(row, column): {1: {"a": 1.0, "b": 0.0}} for row in found.rows for column in found.columns}
    pairs = {(gap.this[0], gap.base[0]) for gap in row_gaps(found, scores)}
    x, h = "NVLM-X, stage.train_llm=", "NVLM-H, stage.train_llm="
    assert pairs == {
        (f"{x}true", f"{x}false"), (f"{h}true", f"{h}false"), (f"{h}true", f"{x}true"), (f"{h}false", f"{x}false")
    }  # fmt: skip


def test_a_start_that_follows_from_the_seed_is_no_axis(configured):
    base = configured("arch=xattn")
    runs = [run(replace(base, init=replace(base.init, checkpoint=f"runs/pretrain-{seed}")), seed) for seed in (1, 2, 3)]
    assert places(grid(runs)) == [("NVLM-X", "", [1, 2, 3])]


def test_of_two_runs_with_one_seed_the_finished_one_counts(configured):
    config = configured("arch=xattn")
    first, second = run(config, status=UNFINISHED, folder="a"), run(config, folder="b")
    found = grid([first, second])
    assert [one.folder.name for one in found.cells[0].runs] == ["b"]
    assert [one.folder.name for one in found.doubled] == ["a"]


def test_settings_name_runs_as_shortly_as_possible(configured):
    words = [("arch=hybrid", "tiling.tag=1d"), ("arch=hybrid", "tiling.tag=none"), ("arch=decoder", "tiling.tag=none")]
    found = {one.key: one.values for one in settings(grid([run(configured(*one), 1) for one in words]))}
    assert found["arch.name"] == (("decoder", "NVLM-D"), ("hybrid", "NVLM-H"))
    assert found["tiling.tag"] == (("none", "no tag"), ("1d", "1-D"))
    assert "seed" not in found and "name" not in found and not np.any([key.startswith("llm.") for key in found])
