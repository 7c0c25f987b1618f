"""The benchmark script for GPUs at toy size, with Transformer Engine's layers and in FP8 (see test_engine.py)."""

from __future__ import annotations

from benchmarks import gpu
from benchmarks.gpu_parts import accuracy
from benchmarks.gpu_parts.rows import rows_of
from nvlm.llm import backend

ABLE = ["bf16", "fp8_delayed", "fp8_current"]


def test_it_runs_to_its_end_in_every_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "check_precision", lambda config: None)
    for module in (gpu, accuracy):
        monkeypatch.setattr(module, "precisions", lambda size: (ABLE, {}))
    out = tmp_path / "gpu.jsonl"
    monkeypatch.setattr("sys.argv", ["gpu.py", "--toy", "--tiles", "3", "1", "--out", str(out)])
    assert gpu.main() == 0
    rows = list(rows_of(out))
    assert [row["precision"] for row in rows if row["cell"].startswith("accuracy")] == ABLE * 3
    kinds = {(row["arch"], row["precision"], row["tiles"]) for row in rows if "samples/s" in row}
    assert kinds == {
        (arch, p, n) for arch in ("decoder", "xattn", "hybrid") for p in ("bf16", "fp8_current") for n in (1, 3)
    }
    assert [row["right"] for row in rows if "attention" in row] == [True] * 4
    assert len([row for row in rows if "peer" in row]) == 2
