"""The benchmark script for GPUs at toy size, with Transformer Engine's layers and in FP8 (see test_engine.py)."""

from __future__ import annotations

import json

from benchmarks import gpu

ABLE = ["bf16", "fp8_delayed", "fp8_current"]


def test_it_runs_to_its_end_in_every_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "check_precision", lambda config: None)
    monkeypatch.setattr(gpu, "precisions", lambda size: (ABLE, {}))
    out = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu.py", "--toy", "--tiles", "1", "3", "--out", str(out)])
    assert gpu.main() == 0
    results = json.loads(out.read_text())
    assert [row["precision"] for row in results["accuracy"]] == ABLE * 3
    kinds = {(row["arch"], row["precision"], row["tiles"]) for row in results["throughput"]}
    assert kinds == {
        (arch, p, n) for arch in ("decoder", "xattn", "hybrid") for p in ("bf16", "fp8_current") for n in (1, 3)
    }
    assert [row["right"] for row in results["attention"]] == [True] * 4
    assert len(results["peers"]) == 3
