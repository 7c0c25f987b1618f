"""A whole sweep: a run that diverges beside one that does not, and the same command again."""

from __future__ import annotations

import json

from tests.e2e.runs import losses, train

WORDS = ["-m", "train.steps=2", "train.max_bad_steps=1", "optim.warmup=0", "name=s"]


def test_a_diverged_run_ends_only_itself_and_the_same_command_does_what_is_missing(tmp_path):
    where = tmp_path / "runs" / "sweep" / "s"
    good, bad = where / "optim.lr=0.001", where / "optim.lr=1e+30"
    done = train(tmp_path, *WORDS, "optim.lr=0.001,1e30", check=False)
    assert done.returncode == 1, done.stdout
    rows = {row["folder"]: row for row in json.loads((where / "sweep.json").read_text())["runs"]}
    assert rows[good.name]["status"] == "done" and rows[bad.name]["status"] == "failed"
    assert "step 2: loss nan" in rows[bad.name]["reason"] and "lower optim.lr" in rows[bad.name]["reason"]
    assert f"failed: {bad.name}: step 2" in done.stdout and "1 of 2 runs done" in done.stdout
    assert "train.threads=1" in rows[good.name]["overrides"] and len(losses(good)) == 2

    before = (good / "log.txt").read_text()
    again = train(tmp_path, *WORDS, "optim.lr=0.001,1e30", "train.max_bad_steps=5", check=False)
    assert again.returncode == 0, again.stdout  # max_bad_steps may change: it is the limit that ends the run
    assert "optim.lr=1e+30: done" in again.stdout and "optim.lr=0.001: " not in again.stdout
    assert (good / "log.txt").read_text() == before

    changed = train(tmp_path, *WORDS, "optim.lr=0.001,1e30", "optim.clip=9", check=False)
    assert changed.returncode == 2 and "optim.clip: got 9.0, expected 1.0" in changed.stdout, changed.stdout
    assert (good / "log.txt").read_text() == before
