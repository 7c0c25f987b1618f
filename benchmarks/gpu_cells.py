"""The figures of benchmarks/gpu.py in cells, the most wanted first, for a GPU that is lent for minutes.

    python benchmarks/gpu_cells.py OUT.jsonl SECONDS [toy] [CELL ...]

A row of JSON is appended after each measurement, so a run that is killed keeps what it had. A cell starts only if the
seconds that it is guessed to take are left, and a second run with the same OUT.jsonl goes on after the cells that are
there. Running out of memory, or any other error, costs that cell alone; a CUDA error that stays in the process ends it
with status 75, and the same command goes on behind that cell. `toy` makes all cells small, as does a machine without a
GPU.

    ceilings                    a copy and a matrix product: what the card gives
    ARCH/PRECISION[+N]          forward and backward, in rows of up to N tokens. -torch behind PRECISION: no Transformer
                                Engine; -encoder: the encoder in FP8, too
    llava/PRECISION             Megatron-Core's LLaVAModel beside NVLM-D; transformers/PRECISION the same
    attention                   kernels of training against dense masks in fp32
    accuracy/ARCH[/PRECISION]   mean losses against fp32; CELL_STEPS=50 for more steps than 25
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the package is not installed

import torch

from benchmarks.gpu_parts.rows import rows_of, tell
from benchmarks.gpu_parts.sizes import Size, size_of
from benchmarks.gpu_parts.timing import forget, machine, prepare
from nvlm.config.values import ConfigError

# Seconds that a cell is guessed to take on an H100, with the compilation that no cell before it did.
CELLS = {
    "ceilings": 6,
    "decoder/bf16": 45,
    "xattn/bf16": 45,
    "hybrid/bf16": 45,
    "decoder/fp8_current": 35,
    "xattn/fp8_current": 35,
    "hybrid/fp8_current": 35,
    "llava/bf16": 35,
    "decoder/bf16+4096": 25,  # a sample a row instead of two: one of 6 tiles and 1024 tokens of text has 2850
    "attention": 40,
    "accuracy/decoder": 45,
    "accuracy/hybrid": 60,
    "accuracy/xattn": 60,
    "xattn/fp8_current-encoder": 40,
    "llava/fp8_current": 30,
    "xattn/fp8_blockwise": 35,
    "decoder/fp8_delayed": 35,
    "decoder/bf16-torch": 60,
    "transformers/bf16": 100,
}
UNKNOWN = 60  # seconds of a cell that is not listed
STUCK = 75  # exit status: start the same command again


def main(arguments: Sequence[str]) -> int:
    """Run the cells that are named, or all; returns the exit status."""
    out, seconds, *names = arguments
    began, toy = time.monotonic(), names[:1] == ["toy"]
    prepare()
    small = toy or not torch.cuda.is_available()
    size = size_of(small)
    if not small:
        size = replace(size, steps=int(os.environ.get("CELL_STEPS", 25)))
    facts = machine()
    print(facts, flush=True)
    return run(names[toy:] or list(CELLS), size, Path(out), facts, began + float(seconds))


def run(names: Sequence[str], size: Size, out: Path, facts: Mapping[str, str], end: float = float("inf")) -> int:
    """Measure the cells that `out` lacks, as long as their time is left; 0, or STUCK.

    `end`: in seconds of time.monotonic(). A cell is there if it has a row of the same machine and commit.
    """
    there = {row.get("cell") for row in rows_of(out) if facts.items() <= row.items()}
    for name in [name for name in names if name not in there]:
        left, needs = end - time.monotonic(), CELLS.get(name, CELLS.get(name.partition("+")[0], UNKNOWN))
        if left < needs:
            print(f"{name}: left out, about {needs} s needed and {left:.0f} s left", flush=True)
            continue
        started = time.monotonic()
        error = measure(name, size, out, facts)
        forget()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        if error and ("CUDA error" in error or "illegal" in error):
            return STUCK
    return 0


def measure(name: str, size: Size, out: Path, facts: Mapping[str, str]) -> str | None:
    """Write the rows of a cell; an error becomes a row as well, and is returned.

    The exception ends here: its traceback would keep the cell's model in memory.
    """
    try:
        for row in cell(name, size):
            tell(out, {"cell": name, **facts, **row})
    except Exception as error:
        if not isinstance(error, ConfigError):  # whose message says it all
            traceback.print_exc(limit=-4)
        text = f"{type(error).__name__}: {error}"[:1500]
        tell(out, {"cell": name, **facts, "error": text})
        return text
    return None


def cell(name: str, size: Size) -> Iterator[dict]:
    """The rows of a cell. What it needs is imported here, so that a part that does not load costs its cells alone."""
    kind, _, rest = name.partition("/")
    if kind == "ceilings":
        yield ceilings()
    elif kind == "attention":
        from benchmarks.gpu_parts.attention import attention

        yield from attention(size)
    elif kind == "accuracy":
        from benchmarks.gpu_parts.accuracy import accuracy

        arch, *precisions = rest.split("/")
        yield from accuracy(arch, precisions or ("bf16", "fp8_current"), size)
    elif kind in ("llava", "transformers"):
        from benchmarks.gpu_parts.beside import beside

        yield from beside(kind, rest, size)
    else:
        from benchmarks.gpu_parts.steps import steps

        yield from steps(kind, rest, size)


def ceilings() -> dict:
    """What the card gives: a copy, counting bytes read and written, and a product of random matrices."""
    if not torch.cuda.is_available():
        return {"copy TB/s": None, "bf16 TFLOP/s": None}
    from triton.testing import do_bench

    a, b = (torch.randn(2**30, device="cuda") for _ in range(2))
    copy_ms = do_bench(lambda: b.copy_(a), return_mode="median")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_ms = do_bench(lambda: a @ b, return_mode="median")
    free, whole = torch.cuda.mem_get_info()
    return {
        "copy TB/s": 8 * 2**30 / copy_ms / 1e9,
        "bf16 TFLOP/s": 2 * 8192**3 / product_ms / 1e9,
        "free GB": free / 1e9,
        "GB": whole / 1e9,
    }


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(sys.argv[1:]))
