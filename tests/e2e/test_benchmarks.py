"""Benchmarks at toy size: those that need a GPU, so that they work once one is available, and one of two processes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import gpu, gpu_cells, gpu_check, gpu_smoke
from benchmarks.gpu_parts import sizes, steps, trace
from benchmarks.gpu_parts.rows import rows_of, short, tables, tell
from benchmarks.gpu_parts.sizes import FULL, a_mixed_row, precisions, size_of
from benchmarks.gpu_parts.ways import Way, verdict
from nvlm.commands.compose import compose_config

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"device": "one", "torch": "2", "commit": "abc"}
SMALL = replace(size_of(toy=True), tiles=(1,), micro_batches=1, repeats=1, steps=2)


def command(*words: str, timeout: float | None = None, **environment: str) -> subprocess.CompletedProcess:
    """A benchmark as people start it: the package is found without being installed."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


# --- cells ---


@pytest.fixture
def models(monkeypatch):
    """The models that were built, each of them only as long as something else holds it."""
    built: list[weakref.ref] = []
    build = steps.build_parts

    def watched(config):
        assert not [one for one in built if one() is not None], "a model is built beside the one before"
        parts = build(config)
        built.extend(weakref.ref(part) for part in parts)
        return parts

    monkeypatch.setattr(steps, "build_parts", watched)
    return built


def test_a_cell_writes_its_rows_and_its_model_is_gone_before_the_next(tmp_path, models):
    out = tmp_path / "cells.jsonl"
    assert gpu_cells.run(["ceilings", "hybrid/bf16", "decoder/bf16-torch+512"], SMALL, out, FACTS) == 0
    rows = list(rows_of(out))
    assert not [row["error"] for row in rows if "error" in row]
    assert [row["cell"] for row in rows] == ["ceilings"] + ["hybrid/bf16"] * 2 + ["decoder/bf16-torch+512"] * 2
    timed, traced = rows[1:3]
    assert timed["samples/s"] > 0 and timed["TFLOP/s"] > 0 and timed["samples"] >= 1 and timed["row"] == 256
    assert traced["kernels"] and math.isclose(traced["busy ms"], sum(traced["by kind"].values()), rel_tol=0.01)
    assert rows[3]["row"] == 512 and rows[3]["samples"] > timed["samples"] and len(models) == 2


def test_a_model_that_does_not_fit_costs_its_cell_alone_and_leaves_nothing(tmp_path, models, monkeypatch):
    out, measured = tmp_path / "cells.jsonl", steps.measured

    def full(config, *rest):
        if config.arch.name == "xattn":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(config, *rest)

    monkeypatch.setattr(steps, "measured", full)
    assert gpu_cells.run(["xattn/bf16", "decoder/bf16"], SMALL, out, FACTS) == 0
    assert ["error" in row for row in rows_of(out)] == [True, False, False] and len(models) == 2


def test_a_row_that_does_not_fit_loses_samples_until_it_does(tmp_path, models, monkeypatch):
    out, measured, sizes_tried = tmp_path / "cells.jsonl", steps.measured, []

    def full(config, batches, *rest):
        sizes_tried.append(sum(map(len, batches[0].ids)))
        if sizes_tried[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(config, batches, *rest)

    monkeypatch.setattr(steps, "measured", full)
    assert gpu_cells.run(["decoder/bf16"], SMALL, out, FACTS) == 0
    timed, _ = rows_of(out)
    assert sizes_tried == [2, 1] and timed["samples"] == 1


def fake(rows: dict[str, list]):
    """In place of gpu_cells.cell: yields these rows, and raises those that are exceptions."""
    seen: list[str] = []

    def cell(name, size):
        seen.append(name)
        for row in rows.get(name, [{"ms": 1.0}]):
            if isinstance(row, Exception):
                raise row
            yield row

    return cell, seen


def test_a_run_that_was_cut_goes_on_after_what_it_has(tmp_path, monkeypatch):
    out = tmp_path / "cells.jsonl"
    cell, seen = fake({})
    monkeypatch.setattr(gpu_cells, "cell", cell)
    gpu_cells.run(["a", "b"], SMALL, out, FACTS)
    with out.open("a") as file:
        file.write('{"cell": "c", "dev')  # killed in the middle of a row
    gpu_cells.run(["a", "b", "c", "d"], SMALL, out, FACTS)
    assert seen == ["a", "b", "c", "d"] and [row["cell"] for row in rows_of(out)] == ["a", "b", "c", "d"]
    gpu_cells.run(["a"], SMALL, out, FACTS | {"commit": "def"})  # another commit's figures are not this one's
    assert seen[4:] == ["a"]


def test_a_cuda_error_that_stays_ends_the_process_and_the_next_one_passes_over_its_cell(tmp_path, monkeypatch):
    out = tmp_path / "cells.jsonl"
    cell, seen = fake({"b": [{"ms": 1.0}, RuntimeError("CUDA error: an illegal memory access was encountered")]})
    monkeypatch.setattr(gpu_cells, "cell", cell)
    assert gpu_cells.run(["a", "b", "c"], SMALL, out, FACTS) == gpu_cells.STUCK
    assert gpu_cells.run(["a", "b", "c"], SMALL, out, FACTS) == 0
    assert seen == ["a", "b", "c"]
    assert [row.get("error", "")[:24] for row in rows_of(out)] == ["", "", "RuntimeError: CUDA error", ""]


def test_a_cell_starts_only_if_its_time_is_left(tmp_path, monkeypatch, capsys):
    cell, seen = fake({})
    monkeypatch.setattr(gpu_cells, "cell", cell)
    gpu_cells.run(["transformers/bf16", "ceilings"], SMALL, tmp_path / "out", FACTS, time.monotonic() + 20)
    assert seen == ["ceilings"] and "transformers/bf16: left out, about 100 s needed" in capsys.readouterr().out


def test_every_cell_is_one_that_can_be_measured():
    names = [*gpu_cells.CELLS, *(name for part in gpu.SECTIONS for name in gpu.cells_of(part, ["bf16", "fp8_current"]))]
    for name in names:
        kind, _, rest = name.partition("/")
        assert kind in (*gpu.ARCHITECTURES, "ceilings", "attention", "accuracy", "llava", "transformers"), name
        arch, *precisions = rest.split("/") if kind == "accuracy" else ("decoder", rest) if rest else ("decoder",)
        assert arch in gpu.ARCHITECTURES, name
        files = [f"conf/precision/{re.split('[+-]', one)[0]}.yaml" for one in precisions]
        assert all((ROOT / file).is_file() for file in files), name


def test_on_a_gpu_a_row_has_its_share_of_the_peak_and_the_planner_s_figures_over_the_measured_ones(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 50 * 10**9)
    config = compose_config(*FULL, "arch=xattn", "precision=bf16")
    load = steps.load_of(steps.one_batch(config, sizes.a_row(config, 1, 64, 400)), 4)
    assert load.micro_batches == 4 and load.samples == 4 * load.work.tiles
    row, slower = (steps._on_gpu(config, load, seconds, flops=4e14) for seconds in (1.0, 2.0))
    assert row["MFU"] == pytest.approx(4e14 / 989.4e12) and row["peak GB"] == 50
    assert 0.8 < row["planned memory"] < 1.4  # 7.6 billion weights of 2 bytes, gradients of 4
    assert row["planned time"] == pytest.approx(2 * slower["planned time"]) and row["planned time"] > 0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "unknown")
    assert "MFU" not in steps._on_gpu(config, load, 1.0, 4e14)


# --- rows ---


def test_a_row_is_printed_in_short_and_kept_whole(tmp_path, capsys):
    row = {"cell": "a", **FACTS, "ms": 1.23456, "losses": [1.0] * 50, "kernels": [("k" * 90, 1.5, 3)] * 30}
    tell(tmp_path / "out", row)
    assert list(rows_of(tmp_path / "out")) == [json.loads(json.dumps(row))]
    assert json.loads(capsys.readouterr().out) == short(row)
    assert short(row) == {"cell": "a", "ms": 1.235, "kernels": ["1.5 " + "k" * 60] * 6}


def test_each_kind_of_rows_has_a_table_of_its_own(capsys):
    speeds = [{"cell": "a", **FACTS, "ms": 1.23456, "losses": [1.0]}, {"cell": "b", **FACTS, "ms": 2.0, "losses": []}]
    kinds = {"cell": "a", **FACTS, "by kind": {"products": 3.14159, "copies": 1.0}, "kernels": []}
    Console(width=80).print(*tables("title", [*speeds, kinds]))
    told = capsys.readouterr().out
    assert told.count("title") == 2 and "1.235" in told and "products 3.142, copies 1" in told and "abc" not in told


def test_speeds_are_compared_with_the_best_of_nvlm_d_where_it_was_timed():
    def row(arch, speed, tiles=6, precision="bf16"):
        return {"arch": arch, "precision": precision, "tiles": tiles, "samples/s": speed}

    rows = [row("decoder", 2.0), row("decoder", 4.0), row("xattn", 6.0), row("hybrid", 5.0, 3), {"kernels": []}]
    assert [one.get("vs decoder") for one in gpu.against_decoder(rows)] == [0.5, 1.0, 1.5, None, None]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("triton_tem_fused_flex_attention_backward_0", "attention"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits", "attention"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", "elementwise"),
        ("triton_poi_fused_gelu_0", "elementwise"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert trace.kind_of(kernel) == kind


def test_a_mixed_row_packs_several_samples_within_its_length():
    for arch in gpu.ARCHITECTURES:
        samples = a_mixed_row(compose_config(*SMALL.overrides, f"arch={arch}"), SMALL)
        assert len({sample.id for sample in samples}) == len(samples) > 1
        assert sum(len(sample.tokens) for sample in samples) <= SMALL.row
        assert len({len(sample.tile_tokens) for sample in samples}) > 1


# --- checks and smoke ---


def test_the_check_of_a_machine_goes_on_after_what_fails(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "MODULES", ("numpy", "no_such_module", "nvlm"))
    monkeypatch.setattr(gpu_check, "RECIPES", (None,))
    monkeypatch.setattr(gpu_check, "engine_line", lambda: "2.20")
    assert gpu_check.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and [line.split()[0] for line in lines if "FAILED" in line] == ["no_such_module"]


def test_a_way_that_computes_the_same_is_right(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sizes, "LEARNER", SMALL.learner)
    monkeypatch.setattr(gpu_smoke, "SMALL", ("seed=7",))
    monkeypatch.setattr(gpu_smoke, "ARCHITECTURES", ("hybrid",))
    monkeypatch.setattr(gpu_smoke, "APART", ("data.form=text",))
    path = str(tmp_path / "new" / "reference")
    gpu_smoke.reference(path)
    for way in ("text", "fp8_current"):
        gpu_smoke.way(way, path)
    rows = [json.loads(line[4:]) for line in capsys.readouterr().out.splitlines() if line.startswith("ROW ")]
    assert [row["right"] for row in rows] == [True, None]  # FP8 is left out without a GPU
    assert rows[0]["arch"] == "hybrid" and rows[0]["same data"] and 0 < rows[0]["apart"] < 0.01


@pytest.mark.parametrize(
    ("losses", "norms", "precision", "right"),
    [
        ((6.0, 6.0, 3.0), (30.0, 30.0, 20.0), "fp32", True),
        ((6.03, 6.0, 3.0), (30.0, 30.0, 20.0), "fp32", False),
        ((6.03, 6.0, 3.0), (30.0, 30.0, 20.0), "bf16", True),
        ((6.03, 6.0, 3.0), (33.0, 30.0, 20.0), "bf16", False),
        ((6.03, 6.0, 3.0), (33.0, 30.0, 20.0), "fp8_current", True),
        ((6.0, 6.0, 5.0), (30.0, 30.0, 20.0), "fp8_current", False),  # learns too little
        ((math.nan, 6.0, 3.0), (30.0, 30.0, 20.0), "fp8_current", False),
        ((6.0, 6.0, 3.0), (math.nan, 30.0, 20.0), "fp8_current", False),
    ],
)
def test_a_way_is_judged_by_the_first_loss_its_gradient_and_the_fall(losses, norms, precision, right):
    exact = gpu_smoke.Steps([6.0, 6.0, 3.0], [30.0, 30.0, 20.0], [1.0, 1.0, 1.0], data=1)
    got = gpu_smoke.Steps(list(losses), list(norms), [0.1, 0.1, 0.1], data=2)
    row = gpu_smoke.judged(got, exact, precision)
    assert row["right"] is right and not row["same data"]


def test_a_way_that_hangs_or_crashes_costs_its_row_alone(tmp_path):
    codes = {
        "well": 'print(\'ROW {"way": "well", "right": true}\')',
        "crashed": "import sys; print('boom'); sys.exit(3)",
        "hung": 'import time; print(\'ROW {"way": "hung", "right": true}\', flush=True); time.sleep(60)',
    }
    ways = [Way.start(name, ["-c", code], tmp_path / name) for name, code in codes.items()]
    end = time.monotonic() + 2
    rows = [row for way in ways for row in way.finished(end)[0]]
    assert [row["right"] for row in rows] == [True, False, True, False]
    assert rows[1]["error"] == "ended with 3: boom" and "ended with -15" in rows[3]["error"]
    assert verdict(rows[1]).startswith("WRONG    crashed")


# --- the commands as a whole ---


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gpu_script_at_toy_size(tmp_path):
    out = tmp_path / "gpu.jsonl"
    run = command("benchmarks/gpu.py", "--toy", "--tiles", "6", "1", "--out", str(out))
    assert run.returncode == 0, run.stdout + run.stderr
    rows = list(rows_of(out))
    kinds = {name: [row for row in rows if row["cell"].startswith(name)] for name in ("accuracy", "attention")}
    assert len(kinds["accuracy"]) == len(precisions(size_of(True))[0]) * 3 and len(kinds["attention"]) == 3
    assert all(row["right"] for found in kinds.values() for row in found)
    timed = {(row["arch"], row["tiles"]): row["samples/s"] for row in rows if "samples/s" in row}
    assert timed.keys() == {(arch, tiles) for arch in gpu.ARCHITECTURES for tiles in (6, 1)}
    assert [row["peer"] for row in rows if "peer" in row] == ["Megatron-Core LLaVAModel", "transformers"]
    assert "vs decoder" in run.stdout
    again = command("benchmarks/gpu.py", "--toy", "--tiles", "6", "1", "--out", str(out))
    assert again.returncode == 0 and list(rows_of(out)) == rows


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cells_and_smoke_as_commands(tmp_path):
    cells = command("benchmarks/gpu_cells.py", str(tmp_path / "cells"), "500", "toy", "decoder/bf16", NVLM_COMMIT="abc")
    assert cells.returncode == 0, cells.stdout + cells.stderr
    assert [row["tiles"] for row in rows_of(tmp_path / "cells")] == [6, 6, 3, 1]
    assert {row["commit"] for row in rows_of(tmp_path / "cells")} == {"abc"}
    kept = str(tmp_path / "reference")
    reference = command("benchmarks/gpu_smoke.py", "reference", kept)
    told = [line.split()[0] for line in reference.stdout.splitlines() if line.startswith(gpu_smoke.ARCHITECTURES)]
    assert told == ["decoder"] * 3 + ["xattn"] * 3 + ["hybrid"] * 3, reference.stderr
    ways = ("fp32", "bf16-torch", "attention", "text", "cli")
    run = command("benchmarks/gpu_smoke.py", "run", kept, str(tmp_path / "out"), *ways, SMOKE_SECONDS="400")
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "out" / "smoke.json").read_text())
    assert [row["way"] for row in rows] == [*(way for way in ways[:-1] for _ in range(3)), *["cli"] * 4]
    assert all(row["right"] for row in rows) and (tmp_path / "out" / "smoke.log").stat().st_size


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_pre_pass_gives_the_gradients_of_an_encoder_in_the_first_stage():
    run = command("benchmarks/vision_prepass.py", "--pipeline", "--steps", "1")
    assert run.returncode == 0, run.stdout + run.stderr
    frozen, learns = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("{"))
    assert frozen["ratio"] > 0 and learns["gradients_differ_by"] < 1e-4
