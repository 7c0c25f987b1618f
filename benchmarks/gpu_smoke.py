"""Does each way of computing work on a GPU, and does it compute the same? Three training steps of each architecture at
small size, each way in a process of its own, all at once; losses and gradient norms against the CPU's in fp32.

    python benchmarks/gpu_smoke.py reference FILE         on a CPU, at the same commit: the losses to compare with
    python benchmarks/gpu_smoke.py run FILE OUT [WAY ...] on the GPU: OUT/smoke.json, OUT/smoke.log, a table at the end
    python benchmarks/gpu_smoke.py way WAY FILE           one of them, in this process

Weights follow from parameters' names and data from the seed, so FILE holds numbers only. Ways that need a GPU are left
out without one. SMOKE_SECONDS=150: a way that takes longer is ended.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the package is not installed

STEPS = 3
SECONDS = int(os.environ.get("SMOKE_SECONDS", 150))
ENGINE, WITHOUT, EITHER = "transformer engine", "", "either"
# name -> (overrides, whether Transformer Engine is needed). Those that tell most come first: time may run out.
WAYS: dict[str, tuple[str, str]] = {
    "fp32": ("precision=fp32", WITHOUT),
    "bf16-torch": ("precision=bf16", WITHOUT),
    "bf16": ("precision=bf16", ENGINE),
    "fp8_current": ("precision=fp8_current", ENGINE),
    "attention": ("", EITHER),
    "text": ("precision=bf16 data.form=text", EITHER),
    "cli": (
        "precision=bf16 arch=hybrid train.steps=12 optim.warmup=2 train.save_every=6 evaluate.questions=6",
        EITHER,
    ),
    "lora": ("precision=fp8_current peft=lora", ENGINE),
    "fp8_delayed": ("precision=fp8_delayed", ENGINE),
    "fp8_blockwise": ("precision=fp8_blockwise", ENGINE),
    "recompute": ("precision=bf16 train.recompute=full", ENGINE),
    "selective": ("precision=fp8_current train.recompute=selective", ENGINE),
    "gather": ("precision=fp8_current precision.param_gather=true parallel.distributed_optimizer=true", ENGINE),
    "graph": ("precision=bf16 vision.graph=true vision.tiles_per_call=4", ENGINE),
    "offload": ("precision=bf16 train.offload=true", ENGINE),
    "encoder": ("precision=fp8_current precision.encoder=true", ENGINE),
}
# Largest relative difference of the first step's loss, and of its gradient norm, by the precision's first word.
LIMITS = {"fp32": (1e-3, 1e-2), "bf16": (0.01, 0.05), "fp8": (0.02, 0.15)}
ARCHITECTURES = ("decoder", "xattn", "hybrid")
# What changes losses by more than rounding, so that it has a reference of its own: rows without images, adapters.
APART = ("data.form=text", "peft=lora")
SMALL = ("train.global_batch=8", "train.micro_batch=4", "data.records=64", "seed=7")


class Steps(NamedTuple):
    """The first steps of a run, and a checksum of their data."""

    losses: list[float]
    norms: list[float]
    seconds: list[float]
    data: int


def fill(parts: Sequence, config) -> dict[str, str]:
    """Weights that depend on their names alone, whatever modules and device hold them. In place of `train.begin`."""
    import torch

    from nvlm.weights.merge import is_adapter

    for part in parts:
        for name, tensor in part.weights().items():
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            if "norm" in name and name.endswith("weight"):
                noise = 1 + 0.1 * noise
            elif name.endswith("gate"):
                noise = 0.5 + 0.1 * noise
            elif noise.dim() < 2:
                noise = 0.02 * noise
            else:
                noise = noise * (0.5 if "embedding" in name else noise.shape[-1] ** -0.5)
            tensor.copy_(0.3 * noise if is_adapter(name) else noise)  # less than the linear beside it, as once trained
    return {}


def steps_of(config) -> Steps:
    """One step's data, learned three times."""
    from benchmarks.gpu_parts.timing import wait
    from nvlm.data.loader import load_steps
    from nvlm.processes import groups
    from nvlm.train import loop
    from nvlm.train.step import train_step

    found = Steps([], [], [], 0)
    with patch.object(loop, "begin", fill), groups.distributed(config.parallel, config.seed) as device:
        trainer = loop.build_trainer(config, device)
        data = next(load_steps(loop.build_steps(config), 0, 0))
        for _ in range(STEPS):
            began = time.perf_counter()
            result = train_step(trainer, data)
            wait()
            found.seconds.append(round(time.perf_counter() - began, 2))
            found.losses.append(result.loss)
            found.norms.append(result.grad_norm)
    return found._replace(data=checksum(data.micro_batches))


def checksum(batches: Sequence) -> int:
    """Of the tokens without padding and the pixels: another version of Pillow may cut other tiles."""
    total = 0
    for batch in batches:
        for tensor in (batch.tokens[batch.sample >= 0], batch.pixels):
            total = zlib.crc32(tensor.contiguous().numpy().tobytes(), total)
    return total


def config_of(arch: str, overrides: str):
    """The configuration of a way."""
    from benchmarks.gpu_parts.sizes import LEARNER
    from nvlm.commands.compose import compose_config

    return compose_config(*LEARNER, *SMALL, f"arch={arch}", *overrides.split())


def reference(path: str) -> None:
    """What this machine computes in fp32, as JSON."""
    kept = {}
    for name in itertools.product(ARCHITECTURES, ("", *APART)):
        kept[" ".join(name)] = found = steps_of(config_of(name[0], f"precision=fp32 {name[1]}"))
        losses, norms = ([round(x, 4) for x in values] for values in (found.losses, found.norms))
        print(*name, losses, norms, found.seconds, flush=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({name: found._asdict() for name, found in kept.items()}) + "\n")


def way(name: str, path: str) -> None:
    """One way: prints ROW and a line of JSON for each result."""
    from benchmarks.gpu_parts.timing import prepare
    from nvlm.llm import backend
    from nvlm.processes.device import has_cuda

    prepare()
    overrides, needs = WAYS[name]
    if needs == ENGINE and (backend.why_not_te() or not has_cuda()):
        why = "no GPU" if not has_cuda() else backend.why_not_te()
        tell({"way": name, "right": None, "error": f"not here: {why}"})
        return
    left_out = patch.object(backend, "why_not_te", lambda: "left out by the benchmark")
    with left_out if needs == WITHOUT else contextlib.nullcontext():
        for row in rows_of(name, overrides, path):
            tell({"way": name} | row)


def tell(row: Mapping[str, object]) -> None:
    """Print a row for the process that started this one."""
    print("ROW", json.dumps(row), flush=True)


def rows_of(name: str, overrides: str, path: str) -> Iterator[dict]:
    """The results of a way; an exception is one as well."""
    if name == "cli":
        yield from command_line(overrides)
        return
    if name == "attention":
        try:
            yield from kernels()
        except Exception as error:
            yield failed("", error)
        return
    kept = json.loads(Path(path).read_text())
    apart = next((words for words in APART if words in overrides.split()), "")
    for arch in ARCHITECTURES:
        try:
            yield compared(arch, overrides, Steps(**kept[f"{arch} {apart}"]))
        except Exception as error:
            yield failed(arch, error)


def kernels() -> Iterator[dict]:
    """The attention kernels of training at toy size, against dense masks."""
    from benchmarks.gpu_parts.attention import attention
    from benchmarks.gpu_parts.sizes import size_of

    for row in attention(size_of(toy=True)):
        errors = {"apart": row["output error"], "norm apart": row["gradient error"]}
        yield {"arch": row["attention"], **errors, "right": row["right"]}


def compared(arch: str, overrides: str, exact: Steps) -> dict:
    """The row of an architecture."""
    from nvlm.llm import backend

    config = config_of(arch, overrides)
    backend.check_precision(config)
    got = steps_of(config)
    return {"arch": arch, "layers": backend.describe(config)} | judged(got, exact, config.precision.name)


def judged(got: Steps, exact: Steps, precision: str) -> dict:
    """The first step's loss and gradient norm relative to `exact`, and whether they are close enough.

    Later losses follow an update, in which a new model enlarges rounding: of those only the fall is compared.
    """
    apart, norm = (abs(a[0] / b[0] - 1) for a, b in ((got.losses, exact.losses), (got.norms, exact.norms)))
    fall = (got.losses[0] - got.losses[-1]) / (exact.losses[0] - exact.losses[-1])
    loss_limit, norm_limit = LIMITS[precision.partition("_")[0]]
    row = {"losses": got.losses, "seconds": got.seconds, "apart": apart, "norm apart": norm, "fall": fall}
    right = apart < loss_limit and norm < norm_limit and fall > 0.5
    return row | {"same data": got.data == exact.data, "right": right}


def command_line(overrides: str) -> Iterator[dict]:
    """Commands as people type them, up to the first that fails: a run that learns, saves and answers; its last steps
    once more, from the checkpoint before; its export; an answer to a picture."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        yield (begun := typed("begun", "train", f"hydra.run.dir={run}", *overrides.split()))
        if not begun["right"]:
            return
        *_, before, last = sorted((run / "checkpoints").glob("step_*"))
        shutil.rmtree(last)
        (run / "checkpoints" / "latest").write_text(before.name + "\n")
        yield (resumed := typed("resumed", "train", f"hydra.run.dir={run}", *overrides.split(), "resume=auto"))
        if not resumed["right"]:
            return
        yield typed("exported", "export_hf", f"checkpoint={run}", f"out={folder}/exported")
        Image.new("RGB", (224, 112), "gray").save(f"{folder}/picture.png")
        asked = f"image={folder}/picture.png", "prompt=How many rows?"
        yield typed("generated", "generate", f"checkpoint={run}", *asked)


def typed(name: str, command: str, *words: str) -> dict:
    """A row about `python launch/COMMAND.py WORDS`, whose output goes to the log."""
    from benchmarks.gpu_parts.ways import last_line

    line = [sys.executable, f"launch/{command}.py", *words]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    right = done.returncode == 0
    return {"arch": name, "right": right} | ({} if right else {"error": last_line(done.stdout)[:200]})


def failed(arch: str, error: Exception) -> dict:
    """The row of an exception, whose stack goes to the log."""
    traceback.print_exc()
    return {"arch": arch, "right": False, "error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def run(path: str, out: str, names: Sequence[str]) -> int:
    """All ways at once; returns 1 if any is wrong. Few files in `out`, renewed after each way; logs beside `path`."""
    from benchmarks.gpu_parts.ways import Way, verdict

    folder, began = Path(out), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    started = [
        Way.start(name, [__file__, "way", name, path], Path(path).with_name(f"{name}.log")) for name in names or WAYS
    ]
    rows: list[dict] = []
    texts: list[str] = []
    for one in started:
        found, text = one.finished(began + SECONDS)
        rows += found
        texts.append(f"===== {one.name}\n{text}")
        (folder / "smoke.json").write_text(json.dumps(rows, indent=1) + "\n")
        (folder / "smoke.log").write_text("\n".join(texts))
    for row in rows:
        print(verdict(row), flush=True)
    bad = sum(row["right"] is False for row in rows)
    print(f"smoke: {len(rows) - bad} rows right or left out, {bad} wrong, {time.monotonic() - began:.0f} s")
    return int(bad > 0)


def main(arguments: Sequence[str]) -> int:
    """The three jobs."""
    match arguments:
        case ["reference", path]:
            reference(path)
        case ["way", name, path]:
            way(name, path)
        case ["run", path, out, *names]:
            return run(path, out, names)
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
