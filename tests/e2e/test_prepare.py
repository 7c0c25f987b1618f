"""The prepare command, killed and started again, and a run on its index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.runs import ROOT, losses, train

DATA = ("data=jsonl", "data.path=r.jsonl", "data.window=2", "data.row_length=160")
RECORDS = 4000


def start(where, *words):
    command = [sys.executable, str(ROOT / "launch" / "prepare.py"), *DATA, *words]
    return subprocess.Popen(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def working_in(where):
    """Process ids of what works in the folder `where`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found += [process.name] if os.readlink(process / "cwd") == str(where) else []
        except OSError:
            continue
    return found


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def contents(index):
    return {path.name: path.read_bytes() for path in (index / "records").iterdir()}


@pytest.mark.slow
def test_a_killed_walk_goes_on_and_its_index_trains_like_the_records(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(9):
        Image.fromarray(rng.integers(0, 255, (*rng.integers(80, 300, 2), 3), dtype=np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    asked = [{"role": "user", "content": "so " * int(n)} for n in rng.integers(1, 30, RECORDS)]
    answer = {"role": "assistant", "content": "Yes."}
    rows = [{"messages": [one, answer], "images": [f"{i % 10}.png"]} for i, one in enumerate(asked)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    walk, partial = start(tmp_path, "data.index=two", "workers=2"), tmp_path / "two" / ".records.partial"
    until(lambda: len(list(partial.glob("chunk-*.npz"))) > 2 or walk.poll() is not None)
    walk.kill()
    walk.communicate()
    until(lambda: not working_in(tmp_path))  # the kernel ends its processes
    done = {path.name: path.stat().st_mtime_ns for path in partial.glob("chunk-*.npz")}
    assert done and not (tmp_path / "two" / "records").exists()

    walk = start(tmp_path, "data.index=two", "workers=2")
    output, progress = walk.communicate(timeout=100)
    assert walk.returncode == 0, progress
    assert "4,000" in output and "400" in output  # records, and those whose image is missing
    one = start(tmp_path, "data.index=one", "workers=1")
    one.communicate(timeout=100)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")

    for name, words in (("plain", ()), ("indexed", ("data.index=two",))):
        train(tmp_path, f"name={name}", *DATA, *words, "train.steps=2", "data.max_skipped=1", "optim.warmup=0")
    assert losses(tmp_path / "runs" / "indexed") == losses(tmp_path / "runs" / "plain")
    resumed = ("name=plain", "data.index=one", "resume=auto", "train.steps=4", "data.max_skipped=1", "optim.warmup=0")
    train(tmp_path, *DATA, *resumed)
    (tmp_path / "r.jsonl").write_text((tmp_path / "r.jsonl").read_text() + "\n")
    refused = train(tmp_path, *DATA, "name=stale", "data.index=one", check=False)
    assert refused.returncode == 2 and "an index of r.jsonl when it had" in refused.stdout
