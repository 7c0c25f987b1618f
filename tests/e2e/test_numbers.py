"""The numbers that a real run reports about itself, and the trace that it writes with profile=true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nvlm.config.hardware import GPUS
from nvlm.config.mapping import from_mapping
from nvlm.config.values import Config
from nvlm.data.amounts import Work
from nvlm.estimate.flops import model_flops
from tests.e2e.runs import rows, train

PHASES = ("data", "vision", "forward-backward", "optimizer", "log")
PROFILED = (4, 5, 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """Eight steps of two replicas with a save after step 5; the run's folder and its output."""
    where = tmp_path_factory.mktemp("numbers")
    layout = ("parallel.data=2", "vision.balance=global", "train.global_batch=6")
    length = ("train.steps=8", "train.save_every=5", "train.log_every=1", "train.async_save=false")
    done = train(where, "name=run", "profile=true", "data.workers=1", *layout, *length)
    return where / "runs" / "run", done.stdout


def test_a_row_s_speed_is_its_work_over_its_time(run):
    config = from_mapping(Config, OmegaConf.to_container(OmegaConf.load(run[0] / "config.yaml")))
    for row in rows(run[0]):
        work = Work(**{name: row[name] for name in Work.__dataclass_fields__})
        assert row["tflops"] == pytest.approx(model_flops(config, work).total / row["seconds"] / 2 / 1e12)
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["padding"] == pytest.approx(1 - row["tokens"] / row["positions"])
        assert row["key_padding"] == pytest.approx(1 - row["keys"] / row["key_positions"])
        assert 0 <= row["padding"] < 1 and 0 <= row["key_padding"] < 1
        assert row["imbalance_replicas"] >= row["imbalance_ranks"] >= 1  # tiles are spread over both replicas
        assert "mfu" not in row  # of which peak, on CPU?


def test_phases_fill_a_step(run):
    for row in rows(run[0]):
        # The save behind step 5 stands with step 6: it is over only when the row of step 5 is written.
        assert set(row["phases"]) == {*PHASES, *(["save"] if row["step"] == 6 else [])}
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"])
        assert row["waiting"] == pytest.approx(row["phases"]["data"] / row["seconds"])
        assert min(row["phases"].values()) > 0


def test_the_line_tells_the_speed(run):
    lines = [line for line in run[1].splitlines() if line.startswith("step ")]
    assert len(lines) == 8
    for line, row in zip(lines, rows(run[0])):
        assert f"{row['tflops']:.3g} TFLOP/s" in line and "MFU" not in line


def test_the_trace_shows_the_phases_of_three_steps(run):
    trace = json.loads((run[0] / "profile" / "trace.json").read_text())
    spans = [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    named = {phase: [event for event in spans if event["name"] == phase] for phase in (*PHASES, "save")}
    assert {phase: len(found) for phase, found in named.items()} == dict.fromkeys(PHASES, 3) | {"save": 1}
    told = {row["step"]: row["phases"] for row in rows(run[0])}
    for phase in ("vision", "forward-backward", "optimizer"):
        for event, step in zip(sorted(named[phase], key=lambda event: event["ts"]), PROFILED):
            assert event["dur"] / 1e6 == pytest.approx(told[step][phase], rel=0.05, abs=2e-3)  # us
    inner = [event for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]
    step = max(named["forward-backward"], key=lambda event: event["dur"])
    assert sum(step["ts"] <= event["ts"] <= step["ts"] + step["dur"] for event in inner) > 100


def test_a_run_too_short_for_a_trace_is_refused(tmp_path):
    done = train(tmp_path, "profile=true", "train.steps=5", check=False)
    assert done.returncode == 2 and "train.steps of at least 6" in done.stderr + done.stdout


def test_mfu_is_told_where_the_gpu_is_known(configured, monkeypatch, tmp_path):
    from nvlm.processes import device, groups
    from nvlm.train import metrics
    from nvlm.train.guard import NAN_ONLY
    from nvlm.train.step import StepResult

    config = configured("precision=bf16", "arch=xattn")
    work = Work(tokens=900, pairs=9000, outputs=900, tiles=7, projected=112, keys=112, cross_pairs=5000)
    result = StepResult(
        loss=1.0, trained_tokens=100, positions=1000, key_positions=128, records=3, skipped=0, fewer_tiles=0, work=work,
        tiles_by_replica=(6, 1), grad_norm=1.0, lr=1e-3, updated=True, guard=NAN_ONLY, stop=False,
    )  # fmt: skip
    monkeypatch.setattr(device, "gpu_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(groups, "world_size", lambda: 4)
    with metrics.Metrics(config, tmp_path, 0, active=True) as told:
        told.record(result, {"data": 1e-6, "vision": 3e-6})
    (row,) = rows(tmp_path)
    assert row["mfu"] == pytest.approx(model_flops(config, work).total / 4e-6 / 4 / GPUS["h200"].bf16)
    assert row["waiting"] == 0.25 and row["imbalance_replicas"] == pytest.approx(6 / 3.5)
