"""Checks everything that needs a GPU in one command: correctness in each precision, speed and memory.

    python benchmarks/gpu.py [--out gpu.jsonl] [--only SECTION ...] [--tiles 6 5 4 3 2 1] [--toy]

Each row is appended to --out as soon as it is measured. The same command goes on after the rows that are there, and
each section can be run apart. Guessed at 14 minutes on one Hopper GPU with 80 GB or more, never timed: accuracy 4,
throughput 7, peers 2; benchmarks/gpu_cells.py runs the same in pieces for a given number of seconds. Without a GPU, or
with --toy, all runs at toy size: its figures then show that it works, but nothing about speed.

accuracy    A small model of each architecture learns the built-in pages, with the same steps in fp32 and in each
            precision that this machine supports. The means of the losses over all steps may differ by at most 1%.
attention   Packed self- and cross-attention with the kernels of training, compared with dense masks in fp32: outputs,
            gradients and times.
throughput  What the card gives: a copy and a matrix product. Then forward and backward of NVLM-D, -X and -H with
            Yi-34B's and InternViT-6B's full widths and a fifth of their layers (12 of 60, 9 of 45, 2 of 10 with
            cross-attention), so that the work has the paper's proportions (Table 3: 1,024 text tokens per sample, the
            whole language model learns). A step has four rows, each of two samples of NVLM-D or four of NVLM-X or -H,
            as in the recipes, or fewer if they do not fit. It has no optimizer: its state does not fit one GPU, and
            training distributes it over replicas. TFLOP/s and MFU count no padding (nvlm.estimate.flops); `planned
            memory` and `planned time` are the planner's over the measured ones. At the first number of tiles, time by
            kernel as well.
peers       The same NVLM-D samples with Megatron-Core's LLaVAModel and with transformers (benchmarks/peers.py).

Figures are medians. Exit status 1 if results are wrong or a cell failed, not if it is slow; 75 after a CUDA error that
stays in the process: run it again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the package is not installed

import torch
from rich.console import Console

from benchmarks import gpu_cells
from benchmarks.gpu_parts.rows import rows_of, tables
from benchmarks.gpu_parts.sizes import ARCHITECTURES, precisions, size_of
from benchmarks.gpu_parts.timing import machine, prepare

SECTIONS = ("accuracy", "attention", "throughput", "peers")
TIMED = ("bf16", "fp8_current", "mxfp8")
ONE_SAMPLE = 4096  # tokens a row in which NVLM-D has one sample of 6 tiles


def main() -> int:
    """Run the sections, print their tables; returns the exit status."""
    options = parsed()
    prepare()
    toy = options.toy or not torch.cuda.is_available()
    size = replace(size_of(toy), tiles=tuple(options.tiles))
    facts, console = machine(), Console(width=150)
    console.print(" ".join(f"{key}: {value}" for key, value in facts.items()), highlight=False)
    able, refused = precisions(size)
    for name, reason in refused.items():
        console.print(f"{name}: not here: {reason}", highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder, "gpu.jsonl")
        for section in options.only:
            names = cells_of(section, able)
            if status := gpu_cells.run(names, size, out, facts):
                return status
            console.print(*tables(section, against_decoder(rows_of_cells(out, names, facts))))
        wanted = [name for section in options.only for name in cells_of(section, able)]
        bad = [row for row in rows_of_cells(out, wanted, facts) if row.get("right") is False or "error" in row]
    console.print(f"wrong: {len(bad)} rows" if bad else "right", highlight=False)
    return int(bool(bad))


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiles", type=int, nargs="+", default=[6, 5, 4, 3, 2, 1])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--toy", action="store_true")
    return parser.parse_args()


def cells_of(section: str, able: Sequence[str]) -> list[str]:
    """The section's cells, by the names that gpu_cells.py has for them. `able`: the precisions of this machine."""
    if section == "accuracy":
        return [f"accuracy/{arch}/{'/'.join(able)}" for arch in ARCHITECTURES]
    if section == "attention":
        return ["attention"]
    if section == "peers":
        return ["llava/bf16", "transformers/bf16"]
    names = [f"{arch}/{precision}" for arch in ARCHITECTURES for precision in TIMED if precision in able]
    return ["ceilings", *names, f"decoder/bf16+{ONE_SAMPLE}"]


def rows_of_cells(out: Path, names: Sequence[str], facts: dict[str, str]) -> list[dict]:
    """The rows of these cells, of this machine and commit."""
    return [row for row in rows_of(out) if row.get("cell") in names and facts.items() <= row.items()]


def against_decoder(rows: Sequence[dict]) -> list[dict]:
    """The rows, with samples/s over NVLM-D's best in the same precision and at as many tiles, where that was timed."""
    best: dict[tuple, float] = {}
    for row in rows:
        if row.get("arch") == "decoder" and "samples/s" in row:
            key = row["precision"], row["tiles"]
            best[key] = max(row["samples/s"], best.get(key, 0.0))

    def ratio(row: dict) -> dict:
        theirs = best.get((row.get("precision"), row.get("tiles")))
        return {"vs decoder": row["samples/s"] / theirs} if theirs and "samples/s" in row else {}

    return [row | ratio(row) for row in rows]


if __name__ == "__main__":
    sys.exit(main())
