"""Loading and exporting compared with `cp` of the same folder, and the host memory that each takes.

    python benchmarks/weights.py [--layers 10] [--folder DIR]

A language model of Qwen2-72B's widths, with random weights, in Hugging Face's format (10 layers: 22.5 GB). One run:

- memory: one of two tensor-parallel ranks, then one of two pipeline stages, each built and filled as in training in a
  separate process (the other rank is a stand-in, since this machine could not hold both), and an export of such a
  model. Peak: all memory that the kernel counts for the process, including mapped files.
- speed: `cp -r` of the folder, loading one rank, and the export, each from a cold page cache, in turn, medians of
  three. Rates refer to the folder's size.
- reads: two real tensor-parallel processes load a part of the folder (--shared-layers) together from a cold cache;
  the bytes that both read from the disk, compared with the folder's size.

It needs three times the folder's size on disk. Bounds: a rank's shard (nothing for the export) plus the largest tensor
plus 2 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

SLACK = 2e9
PROCESS = 0.7e9  # Python, torch and Megatron; with a GPU, the shard is not in the host's memory
# Frozen, so that the checkpoint holds only weights; with the tiny encoder.
BASE = "arch=decoder llm=qwen2-72b vision=tiny parallel=one stage=pretrain precision=bf16 tiling=single".split()
TENSOR = ("parallel.tensor=2",)
PIPELINE = ("parallel.pipeline=2",)


def compose(layers: int, *overrides: str):
    from nvlm.commands.compose import compose_config

    return compose_config(*BASE, f"llm.layers={layers}", *overrides)


# --- material ---


def random_words(count: int):
    """A storage of `count` random bf16 numbers of typical magnitude."""
    import torch

    block = torch.randn(1 << 22).mul_(0.02).to(torch.bfloat16)
    return block.repeat(-(-count // len(block)))[:count]


def write_folder(folder: Path, layers: int) -> None:
    """Random weights under the published names, in files of 5 GB."""
    import torch

    from nvlm.export.shards import Planned, ShardWriter
    from nvlm.weights import llm
    from nvlm.weights.parts import shapes

    named = shapes(llm.parts(compose(layers).llm))
    words = random_words(max(torch.Size(shape).numel() for shape in named.values()))
    folder.mkdir(parents=True)
    with ShardWriter(folder, [Planned(name, "BF16", shape) for name, shape in named.items()], int(5e9)) as writer:
        for name, shape in named.items():
            writer.write(name, words[: torch.Size(shape).numel()].view(shape))


def write_run(run: Path, layers: int) -> None:
    """A run folder with a checkpoint of such a model, as written by one process."""
    import torch
    from torch.distributed import checkpoint

    from nvlm.inputs.sources import whole_model
    from nvlm.runs.digests import write_manifest
    from nvlm.runs.ownership import begin as begin_folder
    from nvlm.vision.encoders.internvit import description as internvit
    from nvlm.weights.published import VISION

    config = compose(layers)
    begin_folder(config, run, fresh=True)
    rows: dict[str, int] = {}
    columns = {}
    for part in whole_model(config, internvit.parts(config.vision)):
        if not part.name.startswith(VISION):
            rows[part.ours] = rows.get(part.ours, 0) + (part.padded or part.shape[0])
            columns[part.ours] = part.shape[1:]
    shapes = {name: (count, *columns[name]) for name, count in rows.items()}
    words = random_words(max(torch.Size(shape).numel() for shape in shapes.values()))
    state = {name: words[: torch.Size(shape).numel()].view(shape) for name, shape in shapes.items()}
    step = run / "checkpoints" / "step_00000001"
    writer = checkpoint.FileSystemWriter(step, single_file_per_rank=True)
    checkpoint.save(state, storage_writer=writer, no_dist=True)
    write_manifest(step, {}, None)
    (run / "checkpoints" / "latest").write_text(step.name)


def cool(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- what is measured, each in a process of its own ---


def load_as(layers: int, folder: str, layout: tuple[str, ...], stand_in: bool) -> dict:
    """Fill this rank's part of the model; `stand_in`: the other of the two ranks is not real."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from nvlm.arch.pipeline import build_parts
    from nvlm.commands.launch import quiet
    from nvlm.processes import device
    from nvlm.processes.groups import _seed
    from nvlm.train.begin import begin

    quiet()
    config = compose(layers, *layout, f"init.llm={folder}")
    device.prepare()
    if stand_in:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    else:
        dist.init_process_group("gloo")
    p = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tensor, pipeline_model_parallel_size=p.pipeline, create_gloo_process_groups=False
    )
    _seed(0)
    started = time.perf_counter()
    parts = build_parts(config)
    built = time.perf_counter()
    begin(parts, config)
    done = time.perf_counter()
    shard = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    for part in parts:
        for parameter in part.parameters():
            assert bool(parameter.view(-1)[::997].isfinite().all())
    fetched = int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])
    return dict(shard=shard, peak=peak(), seconds=done - built, build=built - started, fetched=fetched)


def in_process(*arguments: str, count: int = 1) -> list[dict]:
    """Run `count` processes of this script together; returns what each reports."""
    environment = os.environ | dict(
        WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(random.randrange(10_000, 30_000))
    )
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=environment | dict(RANK=str(rank)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started), outputs
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def export_as(run: str, out: str) -> dict:
    """Run the export command in this process; returns seconds without the imports."""
    from nvlm.commands.launch import quiet
    from nvlm.export.export import export
    from nvlm.export.options import parse

    quiet()
    started = time.perf_counter()
    export(parse([f"checkpoint={run}", f"out={out}"]))
    return dict(seconds=time.perf_counter() - started, peak=peak())


def peak() -> int:
    """Peak memory of this process in bytes, including mapped files. (getrusage's value starts from the parent's.)"""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def copy(folder: Path, target: Path) -> float:
    """Seconds of `cp -r` until the data is on disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(folder), str(target)], check=True)
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - started


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--layers", type=int, default=10)
    options.add_argument("--shared-layers", type=int, default=2)
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--folder", default=None)
    options = options.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        measure(options, Path(scratch))


def arithmetic() -> None:
    """The same for all 80 layers and InternViT-6B, calculated: what the fullest rank holds, and maps at a time."""
    import re

    from nvlm.vision.encoders.internvit import description as internvit
    from nvlm.weights import llm
    from nvlm.weights.parts import Part

    def count(slices) -> int:
        return math.prod(one.stop - one.start for one in slices)

    def stage_of(part: Part, stages: int) -> int:
        layer = re.search(r"decoder\.layers\.(\d+)", part.ours)
        return int(layer[1]) * stages // 80 if layer else 0 if "embedding" in part.ours else stages - 1

    config = compose(80, "vision=internvit-6b", "init.vision=null", "dry_run=true")
    language, encoder = llm.parts(config.llm), internvit.parts(config.vision)
    largest = 2 * max(math.prod(part.shape) for part in language)
    whole = 2 * sum(count(part.extent) for part in encoder)
    print(f"{'Qwen2-72B and InternViT-6B, GB':32} {'shard':>7} {'peak':>7} {'bound':>7}")
    for tensor, stages in ((8, 1), (8, 4), (1, 1)):
        held = [0] * stages
        for part in language:
            held[stage_of(part, stages)] += 2 * count(part.source(0, tensor))
        shard = whole + max(held)
        row = (shard, shard + largest + PROCESS, shard + largest + SLACK)
        print(f"{f'tensor {tensor} x pipeline {stages}':32} " + " ".join(f"{size / 1e9:7.2f}" for size in row))


def measure(options, scratch: Path) -> None:
    from nvlm.weights.published import read_headers

    layers, folder, run, out = str(options.layers), scratch / "folder", scratch / "run", scratch / "out"
    write_folder(folder, options.layers)
    write_run(run, options.layers)
    stored = read_headers(str(folder), "init.llm")
    size, largest = sum(one.bytes for one in stored.values()), max(one.bytes for one in stored.values())
    print(f"folder {size / 1e9:.1f} GB, {len(stored)} tensors, the largest {largest / 1e9:.2f} GB")

    print(f"{'memory, GB':32} {'shard':>7} {'peak':>7} {'bound':>7}")
    for name, layout in (("tensor 2, one rank", TENSOR), ("pipeline 2, first stage", PIPELINE)):
        [got] = in_process("--load", layers, str(folder), *layout)
        bound = got["shard"] + largest + SLACK
        print(f"{name:32} {got['shard'] / 1e9:7.2f} {got['peak'] / 1e9:7.2f} {bound / 1e9:7.2f}")
    times: dict[str, list[float]] = {"cp": [], "load": [], "export": []}
    used = 0
    for _ in range(options.repeat):
        cool(folder)
        times["cp"].append(copy(folder, scratch / "copy"))
        shutil.rmtree(scratch / "copy")
        cool(folder)
        [got] = in_process("--load", layers, str(folder), *TENSOR)
        times["load"].append(got["seconds"])
        cool(run)
        [got] = in_process("--export", str(run), str(out))
        times["export"].append(got["seconds"])
        used = max(used, got["peak"])
        shutil.rmtree(out)
    print(f"{'export':32} {0:7.2f} {used / 1e9:7.2f} {(largest + SLACK) / 1e9:7.2f}")
    print(f"{'speed':32} {'seconds':>7} {'GB/s':>7} {'of cp':>7}")
    for name, several in times.items():
        seconds = statistics.median(several)
        share = statistics.median(times["cp"]) / seconds
        print(f"{name:32} {seconds:7.1f} {size / 1e9 / seconds:7.2f} {share:7.0%}")

    shutil.rmtree(folder)
    shutil.rmtree(run)
    write_folder(folder, options.shared_layers)
    size = sum(one.bytes for one in read_headers(str(folder), "init.llm").values())
    cool(folder)
    both = in_process("--load-together", str(options.shared_layers), str(folder), *TENSOR, count=2)
    fetched = sum(got["fetched"] for got in both)
    print(f"two processes, a folder of {size / 1e9:.2f} GB: {fetched / 1e9:.2f} GB fetched from the disk")
    arithmetic()


if __name__ == "__main__":
    if sys.argv[1:2] in (["--load"], ["--load-together"]):
        how, layers, folder, *layout = sys.argv[1:]
        print(json.dumps(load_as(int(layers), folder, tuple(layout), how == "--load")))
    elif sys.argv[1:2] == ["--export"]:
        print(json.dumps(export_as(*sys.argv[2:])))
    else:
        main()
