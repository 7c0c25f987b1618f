"""logging=wandb with a fake package that records the calls."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest

from nvlm.commands.launch import check_logging
from nvlm.config.values import ConfigError
from tests.e2e.faults import SMALL, rows
from tests.e2e.preloaded import run

WANDB = """
import json, os

def told(*what):
    with open("told", "a") as file:
        file.write(json.dumps(what, default=str) + "\\n")

class Run:
    def define_metric(self, name, step_metric): told("define", name, step_metric)
    def finish(self): told("finish")
    def log(self, row):
        told("log", row)
        if row["step"] == 2:
            raise ConnectionError("no route to host")

def init(**settings):
    told("init", {name: settings[name] for name in ("project", "name", "id", "resume", "mode", "dir")})
    if settings["entity"] == "nobody":
        raise RuntimeError("api_key not configured")
    return Run()
"""


def with_package(folder: Path) -> None:
    """Make the run find a wandb in `folder`."""
    sys.path.insert(0, str(folder))


@pytest.fixture
def package(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "wandb.py").write_text(WANDB)
    return functools.partial(with_package, tmp_path / "package")


def test_steps_and_scores_are_told_and_a_failure_costs_a_line(tmp_path, package):
    options = ["logging=wandb", "logging.mode=offline", "evaluate.questions=2", "evaluate.max_new_tokens=2"]
    for steps in ("3", "4"):
        status, output = run(tmp_path, *SMALL, *options, f"train.steps={steps}", "resume=auto", change=package)
        failed = output.count("Weights & Biases failed (no route to host): training goes on")
        assert status == 0 and failed == (steps == "3"), output  # in its step 2
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    begun = [rest[0] for kind, *rest in told if kind == "init"]
    assert begun[0] == begun[1] and begun[0]["mode"] == "offline" and begun[0]["project"] == "nvlm"
    assert [kind for kind, *_ in told].count("finish") == 2
    logged = [rest[0] for kind, *rest in told if kind == "log"]
    steps = [row for row in logged if "loss" in row]
    assert [(row["step"], row["loss"]) for row in steps] == [(row["step"], row["loss"]) for row in rows(tmp_path)]
    assert [row["step"] for row in logged if "heldout/exact_match" in row] == [3, 4]


def test_who_is_not_logged_in_is_told_before_the_first_step(tmp_path, package):
    status, output = run(tmp_path, *SMALL, "logging=wandb", "logging.entity=nobody", change=package)
    assert status == 2 and "error: logging=wandb: got api_key not configured" in output, output
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists()


def test_a_package_that_is_missing_is_said_at_once(configured, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="no wandb, expected the package wandb. Fix: pip install"):
        check_logging(configured("logging=wandb"))
    check_logging(configured())
