"""Plans: what is counted, what is refused and why, and the two commands that show it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from nvlm.commands import launch
from nvlm.commands.plan import main
from nvlm.config.hardware import GPUS, GiB
from nvlm.config.rules import check_world, validate
from nvlm.config.values import ConfigError
from nvlm.data.pack import pack
from nvlm.estimate.best import waiting
from nvlm.estimate.layouts import candidates, name, overrides, plan
from nvlm.estimate.load import step_load
from nvlm.estimate.memory import least_memory, memory, most_in_flight, rank_memory
from nvlm.estimate.parameters import held
from nvlm.estimate.refuse import check_memory
from nvlm.estimate.speed import speed

ROOT = Path(__file__).resolve().parents[3]
H100 = GPUS["h100"]
# NVLM-H 72B in the paper's layout, one sample to a row: it just fits 128 GPUs.
TIGHT = ("+experiment=nvlm_h_72b_sft", "dry_run=true", "parallel.pipeline=1", "parallel.virtual=1",
         "data.row_length=1280", "data.cross_length=1566")  # fmt: skip


# --- what a step is made of ---


def test_samples_fill_rows_and_rows_a_replica_s_step(configured):
    config = configured("+experiment=nvlm_h_72b_sft", "dry_run=true", "train.global_batch=256")
    load = step_load(config, replicas=8)
    assert (load.length, load.rows, load.micro_batches, load.samples) == (4 * 1280, 1, 8, 32)
    assert (load.stream_from_tiles, load.keys_from_tiles, load.work.tiles) == (4 * 256, 4 * 6 * 256, 4 * 7)
    assert load.tiles == 32 * 7
    assert load.work.tokens == 4 * 1280 and load.work.keys == 4 * 6 * (256 + 5)
    assert load.work.outputs == 4 * (1280 - 256 - 5)  # no label on an image's tokens


def test_a_video_is_a_tile_per_frame_and_costs_the_encoder_most(configured):
    config = configured("+experiment=llava_next_video_7b", "dry_run=true")
    image, video = step_load(config, 8), step_load(config, 8, frames=32)
    assert (video.each, video.work.tiles) == (1, 32)
    assert video.work.tokens - video.work.outputs == 32 * 144  # 12 x 12 a frame, pooled after the projector
    assert video.stream_from_tiles == video.work.projected == 32 * 576
    assert memory(config, 8, video).total > memory(config, 8, image).total


@pytest.mark.parametrize("arch", "dxh")
@pytest.mark.parametrize("size", ["34b", "72b"])
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_rows_of_the_recipes_hold_several_samples(configured, arch, size, stage):
    config = configured(f"+experiment=nvlm_{arch}_{size}_{stage}", "dry_run=true")
    each = 8 if stage == "pretrain" else 2 if arch == "d" else 4
    load = step_load(config, replicas=16)
    samples = config.train.global_batch // 16
    assert load.tiles == samples * load.work.tiles // each and load.length == each * config.data.seq_length
    longest = (load.work.tokens // each, load.work.keys // each)
    rows = pack([longest] * samples, config.data.row_length, config.data.cross_length)
    assert [len(row) for row in rows] == [each] * (samples // each)
    assert load.length <= 8192 and config.llm.layers % config.parallel.pipeline_stages == 0


def test_short_samples_share_rows_until_one_of_both_budgets_is_full(configured):
    config = configured(*TIGHT, "data.row_length=5120", "data.cross_length=3200")
    load = step_load(config, replicas=4, tiles=2, text=100)  # 361 tokens, 522 keys: six to a row
    assert (load.work.tokens, load.work.keys) == (6 * 361, 6 * 522)
    assert load.micro_batches == -(-64 // 6)
    text = step_load(config, replicas=4, tiles=0, text=100)
    assert (text.work.tokens, text.keys, text.tiles) == (5100, 0, 0)


# --- memory ---


@pytest.mark.parametrize(("ranks", "virtual", "micro_batches"), [(2, 1, 1), (4, 1, 9), (8, 1, 3), (2, 2, 2), (2, 2, 8),
                                                                 (4, 3, 8), (4, 2, 4), (4, 5, 40)])  # fmt: skip
def test_in_flight_is_what_megatrons_schedule_keeps(configured, ranks, virtual, micro_batches):
    config = configured("arch=decoder", "llm=yi-34b", "llm.layers=120", "dry_run=true",
                        f"parallel.pipeline={ranks}", f"parallel.virtual={virtual}")  # fmt: skip
    chunks = [3.0**chunk for chunk in range(virtual)]  # so that no two mixtures are equal
    order = [chunk for _, chunk in get_schedule_table(micro_batches, virtual, ranks)]
    for rank in range(ranks):
        ahead = ranks - rank - 1 if virtual == 1 else 2 * (ranks - rank - 1) + (virtual - 1) * ranks
        ahead, now, most, done = min(ahead, len(order)), 0.0, 0.0, 0
        for number, chunk in enumerate(order):
            now += chunks[chunk]
            most = max(most, now)
            if number >= ahead:
                now -= chunks[virtual - 1 - order[done]]
                done += 1
        assert most_in_flight(chunks, config, rank, micro_batches) == pytest.approx(most)


def test_each_part_falls_with_what_cuts_it(configured):
    def need(*keys, replicas=8):
        return memory(configured(*TIGHT, *keys), replicas)

    plain, more = need(), need(replicas=16)
    assert more.optimizer == plain.optimizer / 2 and more.weights == plain.weights
    assert more.features == pytest.approx(plain.features / 2)
    kept = [need(f"train.recompute={how}").activations for how in ("none", "selective", "full")]
    assert kept[0] > 1.5 * kept[1] > 1.5 * kept[2] > 0
    staged = need("parallel.pipeline=4")
    assert staged.gradients < 0.3 * plain.gradients and staged.encoder == plain.encoder
    frozen = need("stage=pretrain")
    assert frozen.gradients < 0.2 * plain.gradients and frozen.weights == plain.weights
    adapted = need("peft=lora", "stage.new=[]")
    assert adapted.optimizer < 0.02 * plain.optimizer < adapted.weights
    beside = need("peft=lora")  # cross-attention, new here, learns in full
    assert adapted.optimizer < beside.optimizer < 0.05 * plain.optimizer
    fp8 = need("precision=fp8_current")
    assert 1.5 * plain.weights < fp8.weights < 2 * plain.weights and fp8.activations < plain.activations
    offloaded = need("train.offload=true")
    assert offloaded.activations < 0.2 * plain.activations
    least = least_memory(configured(*TIGHT), 8)
    assert least.total < plain.total and least.features == least.reserve == 0


def test_weights_kept_in_fp8_alone_cost_half_and_travel_in_half(configured):
    keys = ("llm=qwen2-72b", "precision=fp8_current", "parallel.tensor=8", "parallel.distributed_optimizer=true")
    plain, kept = (configured(*keys, f"precision.param_gather={gather}") for gather in ("false", "true"))
    linears = held(plain, 0).quantized
    assert held(plain, 0).kept_in_fp8 == 0 and held(kept, 0).kept_in_fp8 == linears > 0.9 * held(plain, 0).all
    load = step_load(plain, 4)
    memory = [rank_memory(config, 4, 0, load) for config in (plain, kept)]
    assert memory[0].weights - memory[1].weights == 2 * linears
    assert memory[0].total - memory[1].total == 2 * linears
    traffic = [speed(config, 4, H100, load).traffic.data for config in (plain, kept)]
    assert traffic[0] - traffic[1] == pytest.approx(linears * 3 / 4)
    frozen = configured(*keys, "precision.param_gather=true", "stage=pretrain", "arch=xattn")
    own = configured(*keys, "stage=pretrain", "arch=xattn")
    assert 0 < held(frozen, 0).kept_in_fp8 < 0.2 * held(own, 0).quantized  # cross-attention's


def test_the_papers_layouts_of_34b_fit_its_gpus(configured):
    for letter in "dxh":
        config = configured(f"+experiment=nvlm_{letter}_34b_sft", "dry_run=true")
        assert memory(config, 128 // config.parallel.replica).total < H100.memory
        assert config.parallel.virtual == (5 if letter == "d" else 1)


# --- layouts ---


def test_every_layout_is_listed_once_or_refused_with_a_reason(configured):
    config = configured("arch=hybrid", "llm=yi-34b", "dry_run=true")
    found = plan(config, 16, H100)
    tried = list(candidates(config, 16, ()))
    refused = {layout for refusal in found.refused for layout in refusal.layouts}
    for candidate in tried:
        fits = [o for o in found.fitting if o.config == candidate]
        try:
            replicas = check_world(validate(candidate), 16)
        except ConfigError:
            assert not fits and name(candidate) in refused
            continue
        if memory(candidate, replicas).total <= H100.memory:
            assert len(fits) == 1 and fits[0].gpus == 16
        else:
            assert not fits and name(candidate) in refused
    rates = [option.samples_per_second for option in found.fitting]
    assert len(rates) > 50 and rates == sorted(rates, reverse=True)
    assert all(0.05 < option.mfu(H100) < 0.6 for option in found.fitting)
    assert sum("memory" in refusal.reason for refusal in found.refused) > 3


def test_a_layout_in_words_is_that_layout(configured):
    base = ("arch=hybrid", "llm=yi-34b", "dry_run=true", "parallel.virtual=5", "parallel.pipeline=2")
    found = plan(configured(*base), 32, H100)
    for option in found.fitting[:: len(found.fitting) // 5]:
        said = configured(*base, *overrides(option.config, option.replicas).split())
        assert dataclasses.replace(said.parallel, data=1) == dataclasses.replace(option.config.parallel, data=1)
        assert said.parallel.data * said.parallel.replica == 32
        assert said.train == option.config.train


def test_short_rows_are_told_with_longer_ones(configured):
    fixed = ("parallel.tensor=8", "parallel.pipeline=1", "train.recompute=none")
    for rows, said in (((1280, 1566), "data.row_length=5120 data.cross_length=6264"), ((5120, 6264), None)):
        keys = (f"data.row_length={rows[0]}", f"data.cross_length={rows[1]}")
        config = configured(
            "arch=hybrid", "llm=yi-34b", "data=jsonl", "data.path=x.jsonl", "dry_run=true", *keys, *fixed
        )
        best = plan(config, 64, H100, [key.partition("=")[0] for key in fixed]).fitting[0]
        assert (said in waiting(best)) if said else waiting(best) is None


def test_what_is_asked_for_is_held_to(configured):
    config = configured("+experiment=nvlm_d_34b_sft", "dry_run=true", "parallel.tensor=4", "train.recompute=full")
    found = plan(config, 32, H100, fixed=("parallel.tensor", "train.recompute"))
    assert {(o.config.parallel.tensor, o.config.train.recompute) for o in found.fitting} == {(4, "full")}
    wrong = plan(config, 30, H100, fixed=("parallel.tensor",))
    assert not wrong.fitting and "expected a multiple of 4" in wrong.refused[0].reason


def test_where_nothing_fits_the_nearest_is_told(configured, capsys):
    assert main(["gpus=8", "gpu=h100", "+experiment=nvlm_d_72b_sft"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Nothing fits 8 GPUs. Nearest: tensor 8 x pipeline 1, recompute" in said and "GiB too much" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpu=h100"], "gpus: got nothing"),
        (["gpus=0", "gpu=h100"], "gpus: got '0', expected a whole number of at least 1"),
        (["gpus=two", "gpu=h100"], "gpus: got 'two'"),
        (["gpus=-8", "gpu=h100"], "gpus: got '-8'"),
        (
            ["gpus=8", "gpu=h10"],
            "gpu: got 'h10', expected one of h100, h100-pcie, h200, a100-80gb, l40s, b200. Fix: gpu=",
        ),
        (["gpus=8"], "gpu: got nothing, on a machine without a GPU"),
        (["gpus=8", "gpu=a100-80gb", "llm=qwen2-7b", "precision=fp8_current"], "expected a GPU with FP8"),
        (["gpus=8", "gpu=h100", "tiles=7"], "tiles: got 7, expected at most tiling.max_tiles=6"),
        (["gpus=8", "gpu=h100", "frames=9"], "frames: got 9, expected at most video.frames=8. Fix: frames=8, or video"),
        (["gpus=8", "gpu=h100", "frames=8", "tiles=6"], "frames: got 8, expected nothing beside tiles"),
        (["gpus=8", "gpu=h100", "arch=decoder,xattn"], "2 configurations"),
        (["gpus=8", "gpu=h100", "gpsu=8"], "gpsu: got a key that does not exist, expected one of gpu, gpus"),
        (["gpus=8", "gpu=h100", "parallel.tensor=3"], "parallel.tensor: got 3"),
    ],
)
def test_a_mistake_is_answered_in_one_line(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(launch, "gpus_here", lambda: ())
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and said in told and told.count("\n") == 1


def test_the_command_tells_all_parts_and_writes_them(tmp_path):
    """In a separate process without torch."""
    out = tmp_path / "plan.json"
    code = (
        "import sys; from nvlm.commands.plan import main\n"
        f"status = main(['gpus=16', 'gpu=h200', 'arch=hybrid', 'llm=qwen2-7b', 'json={out}'])\n"
        "assert not any(m == 'torch' or m.startswith('megatron') for m in sys.modules)\n"
        "sys.exit(status)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for word in ("weights", "encoder", "gradients", "optimizer", "activations", "features", "workspace", "bubble",
                 "samples/s", "MFU", "refused: ", "Assumed: "):  # fmt: skip
        assert word in run.stdout
    layouts = json.loads(out.read_text())["layouts"]
    assert layouts[0]["samples_per_second"] >= layouts[-1]["samples_per_second"] > 0
    parts = dict(layouts[0]["memory"])
    scales = 45 * 2 * 3200  # are multiplied into linears
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert parts["encoder"] == 2 * (5_536_496_000 - scales)


# --- refusals of runs ---


def test_a_run_that_cannot_fit_is_refused_with_a_change_that_helps(configured):
    config = configured(*TIGHT)
    with pytest.raises(ConfigError) as refused:
        check_memory(config, 64, "NVIDIA H100 80GB HBM3", H100.memory)
    said = str(refused.value)
    assert "got 79." in said and "gradients 34.9" in said and "Fix: train.recompute=selective" in said
    assert "launch/plan.py gpus=64" in said
    helped = configured(*TIGHT, "train.recompute=selective")
    check_memory(helped, 64, "", H100.memory)
    check_memory(config, 64, "", GPUS["h200"].memory)
    check_memory(config, 128, "", H100.memory)


@pytest.mark.parametrize(
    ("keys", "processes", "fix"),
    [
        (("parallel.distributed_optimizer=false",), 128, "parallel.distributed_optimizer=true"),
        (("parallel.tensor=4",), 64, "parallel.tensor=8 parallel.sequence=true"),
        ((), 8, "the same layout on"),
        (("parallel.tensor=1", "parallel.sequence=false"), 64, "parallel.tensor=8 parallel.sequence=true"),
    ],
)
def test_the_change_is_enough(configured, keys, processes, fix):
    base = (*TIGHT, *keys)
    with pytest.raises(ConfigError, match="memory: got") as refused:
        check_memory(configured(*base), processes, "h100", H100.memory)
    words = str(refused.value).partition("Fix: ")[2].partition(" (")[0]
    assert words.startswith(fix)
    changed, _, gpus = words.partition(" on ")
    changes = [word for word in changed.split() if "=" in word]
    gpus = int(gpus.split()[0]) if gpus else processes
    again = configured(*base, *changes)
    check_memory(again, gpus, "h100", H100.memory)


SMI = """#!/bin/sh
echo "GPU-aa11, NVIDIA H100 80GB HBM3, {memory}"
echo "GPU-bb22, NVIDIA H200, {memory}"
"""


def with_gpus(folder: Path, memory: str) -> dict[str, str]:
    """An environment whose nvidia-smi reports two GPUs."""
    tool = folder / "nvidia-smi"
    tool.write_text(SMI.format(memory=memory))
    tool.chmod(0o755)
    return {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"} | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"
    }


def test_the_launcher_refuses_by_what_the_driver_tells(tmp_path):
    """No torch, no run folder."""
    records = tmp_path / "records.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    records.write_text(json.dumps({"messages": turns}) + "\n")
    arguments = ["arch=decoder", "llm=qwen2-7b", "parallel.tensor=2", "data=jsonl", f"data.path={records}",
                 "llm.tokenizer=tiny",
                 "init.vision=nowhere", f"hydra.run.dir={tmp_path / 'run'}"]  # fmt: skip
    code = (
        "import sys, time; from nvlm.commands.train import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "status = main(time.time())\n"
        "assert not any(m == 'torch' or m.startswith('megatron') for m in sys.modules)\n"
        "sys.exit(status)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=with_gpus(tmp_path, "81559"))
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: memory: got ") and "at most 79.1 GiB of NVIDIA H100 80GB HBM3" in run.stderr
    assert run.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("told", "gpus"), [("81559", (81559 * 2**20,) * 2), ("[N/A]", (0, 0)), ("", (0, 0))])
def test_gpus_are_known_without_torch(tmp_path, monkeypatch, told, gpus):
    for key, value in with_gpus(tmp_path, told).items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert tuple(size for _, size in launch.gpus_here.__wrapped__()) == gpus
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch.gpus_here.__wrapped__() == ()


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1", ["H200"]),
        ("1,0", ["H200", "H100"]),
        ("GPU-b", ["H200"]),
        ("0,-1,1", ["H100"]),
        ("7", []),
        ("MIG-x", ["H100"]),
    ],
)
def test_gpus_that_are_hidden_do_not_count(tmp_path, monkeypatch, visible, names):
    for key, value in with_gpus(tmp_path, "81559").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [name.split()[1] for name, _ in launch.gpus_here.__wrapped__()] == names


def test_a_dry_run_is_held_to_the_gpu_that_it_names(configured, monkeypatch):
    monkeypatch.setattr(launch, "gpus_here", lambda: ())
    small = ("arch=decoder", "llm=qwen2-7b", "dry_run=true")
    launch.check_fits(configured(*small))
    with pytest.raises(ConfigError, match=r"on 4 GPUs .* expected at most 79.1 GiB of h100"):
        launch.check_fits(configured("arch=decoder", "llm=yi-34b", "dry_run=true", "parallel.tensor=4", "gpu=h100"))
    with pytest.raises(ConfigError, match="gpu: got 'h1000', expected one of"):
        configured(*small, "gpu=h1000")
    assert GPUS["h200"].memory > 139 * GiB
