"""Benchmarks that need a GPU run here at toy size, so that they work once a GPU is available."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_gpu_script_at_toy_size(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--toy", "--tiles", "1", "6", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(out.read_text())
    assert results["toy"] and results["machine"]["device"]
    for section in ("accuracy", "attention"):
        assert results[section] and all(row["right"] for row in results[section])
    assert {(row["arch"], row["tiles"]) for row in results["throughput"]} == {
        (arch, tiles) for arch in ("decoder", "xattn", "hybrid") for tiles in (1, 6)
    }
    assert all(row["samples/s"] > 0 and row["TFLOP/s"] > 0 for row in results["throughput"])
    assert len(results["peers"]) == 3
