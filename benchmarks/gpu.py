"""Checks everything that needs a GPU in one command: correctness in each precision, speed and memory.

    python benchmarks/gpu.py [--out gpu.json] [--tiles 1 2 3 4 5 6] [--only accuracy attention throughput peers] [--toy]

Meant to take less than eight minutes on one Hopper GPU with 80 GB or more, which has not been timed yet. Without a GPU,
or with --toy, the same code runs at toy size; its figures then show that it works, but nothing about speed.

accuracy    A small model of each architecture learns the embedded pages, with the same steps in fp32 and in each
            precision that this machine supports. The means of the losses over all steps may differ by at most 1%.
attention   Packed self- and cross-attention with the kernels of training, compared with dense masks in fp32: outputs,
            gradients and times.
throughput  Forward and backward of NVLM-D, -X and -H with Yi-34B's and InternViT-6B's full widths and a fifth of their
            layers (12 of 60, 9 of 45, 2 of 10 with cross-attention), so that the work has the paper's proportions
            (Table 3: 1,024 text tokens per sample, the whole language model learns). One row of packed samples per
            step. No optimizer: its state does not fit one GPU, and training distributes it over replicas. TFLOP/s and
            MFU count no padding (nvlm.estimate.flops); `forecast` is the planner's memory over the measured peak.
peers       The same NVLM-D samples with Megatron-Core's LLaVAModel and with transformers (benchmarks/peers.py).

Figures are medians. Exit status 1 if results are wrong, not if they are slow.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from nvlm.arch import registry
from nvlm.arch.pipeline import build_parts, build_pipeline, tile_use_of_rank
from nvlm.attention.choice import kernels_of
from nvlm.attention.kernel import View
from nvlm.attention.kernels.dense import DENSE
from nvlm.attention.kernels.flex import Flex
from nvlm.commands import launch
from nvlm.commands.compose import compose_config
from nvlm.config.compute import FP8_RECIPES
from nvlm.config.hardware import known_gpu
from nvlm.config.values import Config, ConfigError
from nvlm.data.batch import PAD, Batch, Sample
from nvlm.data.loader import load_steps
from nvlm.data.outline import build_processor, outline
from nvlm.data.pack import collate
from nvlm.data.record import Record
from nvlm.data.samples import encode
from nvlm.data.work import count_work
from nvlm.estimate.flops import model_flops
from nvlm.estimate.load import batch_load
from nvlm.estimate.memory import memory
from nvlm.llm.backend import check_precision, describe, this_machine, uses_te
from nvlm.processes import groups
from nvlm.train.loop import build_steps, build_trainer
from nvlm.train.optim import freeze, wrap
from nvlm.train.step import Trainer, forward_backward, train_step
from nvlm.vision.encoders.internvit.model import InternViT
from nvlm.vision.path import VisionPath, solo_groups
from nvlm.vision.prepass import BalancedVision, build_team

ARCHITECTURES = ("decoder", "xattn", "hybrid")
SECTIONS = ("accuracy", "attention", "throughput", "peers")
CLOSE = 0.01  # relative difference of the mean losses
TEXT = 1024  # tokens a sample (Table 3)
# Wide enough for every FP8 recipe; the encoder is the one that ships with the package.
LEARNER = """llm.hidden=512 llm.heads=8 llm.kv_heads=4 llm.head_dim=64 llm.ffn=1536 optim.lr=5e-4 optim.warmup=5
train.global_batch=16 train.micro_batch=4 data.workers=0 data.records=400 evaluate=none""".split()
FULL = """llm=yi-34b llm.layers=12 llm.tokenizer=tiny llm.bos=null vision.layers=9 parallel=one stage=sft data=pages
evaluate=none tiling.tag=1d data.seq_length=4096""".split()
TOY = """llm=tiny llm.layers=5 llm.cross_every=2 stage=sft tiling.tag=1d data.seq_length=512 evaluate=none
data.workers=0""".split()


@dataclass(frozen=True)
class Size:
    """Sizes of the benchmark. `text`: tokens per sample; `row`: tokens per packed row."""

    overrides: tuple[str, ...]
    learner: tuple[str, ...]
    steps: int
    text: int
    row: int
    repeats: int


def size_of(toy: bool) -> Size:
    """The full size, with rows as long as the memory allows, or the toy size."""
    if toy:
        learner = (*TOY, "train.global_batch=4", "train.micro_batch=2", "data.records=16", "optim.warmup=2")
        return Size(tuple(TOY), learner, steps=4, text=64, row=256, repeats=2)
    roomy = torch.cuda.get_device_properties(0).total_memory > 100e9
    return Size(tuple(FULL), tuple(LEARNER), steps=50, text=TEXT, row=8192 if roomy else 4096, repeats=5)


def main() -> int:
    """Run the sections, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    launch.quiet()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks.peers
    began, cuda = time.time(), torch.cuda.is_available()
    size = size_of(options.toy or not cuda)
    results: dict = {"machine": machine(), "toy": options.toy or not cuda}
    console = Console(width=150)
    console.print(" ".join(f"{key}: {value}" for key, value in results["machine"].items()), highlight=False)
    able, results["refused"] = precisions(size)
    for name, reason in results["refused"].items():
        console.print(f"{name}: not here: {reason}", highlight=False)
    sections = {
        "accuracy": lambda: accuracy(size, able),
        "attention": lambda: attention(size),
        "throughput": lambda: throughput(size, able, options.tiles),
        "peers": lambda: peers(size, options.tiles),
    }
    wrong = False
    for name in options.only:
        started = time.time()
        rows = results[name] = sections[name]()
        wrong |= any(row.get("right") is False for row in rows)
        console.print(as_table(f"{name}, {time.time() - started:.0f} s", rows))
    results["seconds"] = round(time.time() - began, 1)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"{'wrong' if wrong else 'right'}, {results['seconds']:.0f} s", highlight=False)
    return int(wrong)


def machine() -> dict[str, str]:
    """Description of the machine and its software."""
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"device": name, "torch": torch.__version__, "commit": commit}


def precisions(size: Size) -> tuple[list[str], dict[str, str]]:
    """The precisions that this machine supports besides fp32, and why it lacks the others."""
    able, refused = [], {}
    for name in ("bf16", *FP8_RECIPES):
        try:
            check_precision(compose_config(*size.learner, f"precision={name}"))
            able.append(name)
        except ConfigError as error:
            refused[name] = str(error)
    return able, refused


# --- accuracy ---


def accuracy(size: Size, able: Sequence[str]) -> list[dict]:
    """Mean losses over the same steps in each precision, compared with fp32."""
    rows = []
    for arch in ARCHITECTURES:
        exact = losses(size, arch, "fp32")
        for name in able:
            got = losses(size, arch, name)
            apart = abs(statistics.mean(got) / statistics.mean(exact) - 1)
            worst = max(abs(a / b - 1) for a, b in zip(got, exact, strict=True))
            row = {"arch": arch, "precision": name, "steps": size.steps, "fp32 mean": statistics.mean(exact)}
            rows.append(row | {"apart": apart, "worst step": worst, "last loss": got[-1], "right": apart < CLOSE})
    return rows


def losses(size: Size, arch: str, precision: str) -> list[float]:
    """Losses of the first steps of a run."""
    config = compose_config(*size.learner, f"arch={arch}", f"precision={precision}", "seed=7")
    with groups.distributed(config.parallel, config.seed) as device:
        trainer = build_trainer(config, device)
        data = load_steps(build_steps(config), 0, 0)
        found = [train_step(trainer, next(data)).loss for _ in range(size.steps)]
    forget()
    return found


# --- attention ---


def attention(size: Size) -> list[dict]:
    """Packed attention on the architectures' rows: the kernels of training compared with dense masks."""
    rows = []
    for arch in ("decoder", "xattn", "hybrid"):
        config = compose_config(*size.overrides, f"arch={arch}", "precision=bf16")
        with groups.distributed(config.parallel, config.seed) as device:
            samples = some_samples(config, size, tiles=6)
            batch = collate([samples], config.vision.tile_size, config.row_multiple).to(device)
            columns = torch.arange(batch.tokens.shape[1], device=device)
            shape = config, len(columns), len(columns)
            if arch == "decoder":
                dense, blocks = (kernel.columns(batch) for kernel in (DENSE, Flex()))
                rows.append(compared("self, blocks", *shape, dense, blocks.attend, device))
                if uses_te(config):
                    packed, padding_S = te_of(config, batch), batch.sample[0] == PAD
                    rows.append(compared("self, Transformer Engine", *shape, dense, packed, device, padding_S))
            else:
                dense, blocks = (kernel.keys(batch, columns) for kernel in (DENSE, Flex()))
                shape = config, len(columns), batch.cross_tokens.shape[1]
                rows.append(compared(f"cross, {arch}, blocks", *shape, dense, blocks.attend, device))
        forget()
    return rows


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def te_of(config: Config, batch: Batch) -> Attend:
    """Transformer Engine's attention of a batch of one row, as a decoder layer has it."""
    (model,) = build_parts(replace(config, llm=replace(config.llm, layers=1), arch=replace(config.arch, cross_every=0)))
    core, view = model.decoder.layers[0].self_attention.core_attention, model.attends().columns.columns(batch)
    return lambda q, k, v: core(q, k, v, view)


def compared(
    name: str,
    config: Config,
    queries: int,
    keys: int,
    dense: View,
    packed: Attend,
    device: torch.device,
    padding_S: torch.Tensor | None = None,
) -> dict:
    """Errors of `packed`, which computes in bf16, relative to the largest value of fp32 attention; and both times.

    FlexAttention has no backward on CPU, so only outputs are compared there. `padding_S`: True where the output of
    `packed` does not matter.
    """
    generator = torch.Generator(device).manual_seed(3)
    llm, dtype = config.llm, torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = ((queries, 1, llm.heads), (keys, 1, llm.kv_heads), (keys, 1, llm.kv_heads))
    inputs = [torch.randn(*shape, llm.head_dim, generator=generator, device=device).to(dtype) for shape in shapes]
    learns = device.type == "cuda"
    looked_at = torch.ones(queries, 1, 1, device=device) if padding_S is None else (~padding_S).float()[:, None, None]

    def run(function: Attend, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_(learns) for x in inputs]
        out = function(*leaves)
        out = out * looked_at.to(out.dtype)
        if not learns:
            return [out]
        out.backward(torch.ones_like(out) * torch.linspace(-1, 1, len(out), device=device).to(out.dtype)[:, None, None])
        return [out, *(leaf.grad for leaf in leaves)]

    exact = run(dense.attend, [x.float() for x in inputs])
    got = run(packed, inputs)
    errors = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True)]
    blind = dense.mask.all(-1)[0, 0]
    zero = not blind.any() or not got[0][blind].any()
    seconds = (
        timed(lambda: run(packed, inputs), 5),
        timed(lambda: run(dense.attend, inputs), 5),
    )
    return {
        "attention": name, "queries": queries, "keys": keys, "seen": float((~dense.mask).float().mean()),
        "error": errors[0], "gradient error": max(errors[1:], default=None), "blind get zero": bool(zero),
        "ms": 1e3 * seconds[0], "dense ms": 1e3 * seconds[1], "right": zero and max(errors) < 0.02,
    }  # fmt: skip


# --- throughput ---


def throughput(size: Size, able: Sequence[str], tiles: Sequence[int]) -> list[dict]:
    """Each architecture and precision at each number of tiles."""
    rows = []
    for arch in ARCHITECTURES:
        for name in [p for p in able if p in ("bf16", "fp8_current", "mxfp8")]:
            config = compose_config(*size.overrides, f"arch={arch}", f"precision={name}")
            with learner(config) as trainer:
                for count in tiles:
                    samples = some_samples(config, size, count)
                    rows.append(measured(config, size, count, samples, trainer))
            forget()
    best = {(row["arch"], row["precision"], row["tiles"]): row["samples/s"] for row in rows}
    for row in rows:
        row["vs decoder"] = row["samples/s"] / best["decoder", row["precision"], row["tiles"]]
    return rows


@contextlib.contextmanager
def learner(config: Config) -> Iterator[Trainer]:
    """A trainer of `config` with gradient buffers, without an optimizer."""
    with groups.distributed(config.parallel, config.seed) as device:
        check_precision(config)
        parts = [part.to(device) for part in build_parts(config)]
        for part in parts:
            freeze(part, config)
        stages = build_pipeline(config, parts)
        chunks = tuple(wrap(part, config) for part in parts)
        parts[0].config.finalize_model_grads_func = stages.finalize
        fresh = replace(config, init=replace(config.init, vision=None))
        path = VisionPath(InternViT(fresh, solo_groups()).to(device), replace(config.vision, graph=False))
        vision = BalancedVision(path, build_team(tile_use_of_rank(config, 0), config.vision.balance))
        yield Trainer(chunks, stages, vision, SimpleNamespace(zero_grad=lambda: None), None, device, {})


def measured(config: Config, size: Size, tiles: int, samples: Sequence[Sample], trainer: Trainer) -> dict:
    """One row of the table."""
    batch = collate([samples], config.vision.tile_size, config.row_multiple)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: forward_backward(trainer, [batch]), size.repeats)
    work = count_work(batch)
    flops = model_flops(config, work).total / seconds
    foretold = memory(config, 1, batch_load(batch, work), kernels_of(config, this_machine()))
    foretold_bytes = foretold.allocated - foretold.optimizer
    row = {
        "arch": config.arch.name, "precision": config.precision.name, "engine": "TE" if uses_te(config) else "torch",
        "tiles": tiles, "samples": len(samples), "tokens": batch.num_tokens, "keys": int(batch.cross_tokens.shape[1]),
        "ms": 1e3 * seconds, "samples/s": len(samples) / seconds, "TFLOP/s": flops / 1e12,
    }  # fmt: skip
    if trainer.device.type == "cuda":
        gpu = known_gpu(torch.cuda.get_device_name())
        row["MFU"] = flops / gpu.peak(config.precision.name) if gpu else None
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        row["forecast"] = foretold_bytes / torch.cuda.max_memory_allocated()
    return row


def some_samples(config: Config, size: Size, tiles: int) -> list[Sample]:
    """Equal samples to fill a row: an image of `tiles` tiles and `size.text` tokens of text, half of them answers."""
    processor = replace(build_processor(config, registry.placement_rule(config.arch.name)), cross_length=10**6)
    image = Image.new("RGB", (config.vision.tile_size * tiles, config.vision.tile_size), "gray")
    letters = size.text // 2
    while True:
        words = "".join(chr(97 + n * 7 % 26) for n in range(letters))
        messages = [dict(role="user", content="<image>\n" + words), dict(role="assistant", content=words)]
        record = Record(f"{tiles} tiles", messages, [image])
        sketch = outline(record, replace(processor, seq_length=10**6))
        text = sum(len(run.ids) for run in sketch.runs)
        if text >= size.text:
            break
        letters += max(1, (size.text - text) // 2)
    sample = encode(record, replace(processor, seq_length=10**6))
    count = max(1, size.row // len(sample.tokens))
    return [replace(sample, id=f"{sample.id} {number}") for number in range(count)]


# --- peers ---


def peers(size: Size, tiles: Sequence[int]) -> list[dict]:
    """Our step and the peers' with the largest number of tiles, on the same samples without tags, in bf16."""
    from benchmarks.peers import llava_model, transformers_model

    config = compose_config(*size.overrides, "arch=decoder", "precision=bf16", "tiling.tag=none")
    samples = some_samples(config, size, max(tiles))
    batch = collate([samples], config.vision.tile_size, config.row_multiple)
    with learner(config) as trainer:
        ours = timed(lambda: forward_backward(trainer, [batch]), size.repeats)
    forget()
    rows = [
        {
            "trainer": f"ours ({describe(config)})",
            "ms": 1e3 * ours,
            "samples/s": len(samples) / ours,
            "ours over it": 1.0,
        }
    ]
    for build in (llava_model, transformers_model):
        with groups.distributed(config.parallel, config.seed) as device:
            peer = build(config, device)
            seconds = timed(lambda peer=peer: peer.step(samples), size.repeats)
            rows.append({"trainer": peer.name, "ms": 1e3 * seconds, "samples/s": len(samples) / seconds,
                         "ours over it": seconds / ours})  # fmt: skip
            del peer
        forget()
    return rows


# --- what they share ---


def timed(function: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after two warm-up calls."""
    seconds = []
    for number in range(repeats + 2):
        wait()
        began = time.perf_counter()
        function()
        wait()
        if number >= 2:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def wait() -> None:
    """Until the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget() -> None:
    """Free the memory of deleted objects."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_table(title: str, rows: Sequence[dict]) -> Table:
    """A table of `rows`, which have the same columns."""
    table = Table(title=title, title_justify="left")
    for heading in rows[0] if rows else ():
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
