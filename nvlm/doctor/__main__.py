"""The command: `python -m nvlm.doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nvlm.doctor
from nvlm.doctor.machine import disk_row, gpu_row, library_row, memory_row, nvcc_row, tokenizer_row
from nvlm.doctor.packages import apex_row, engine_row, flash_row, optional_row, package_row, python_row
from nvlm.doctor.probe import QUESTIONS, TIMEOUT, Probe, findable, probe
from nvlm.doctor.rows import STOPS, Row
from nvlm.doctor.versions import requirements


def examine(tokenizer: str | None = None, timeout: float = TIMEOUT) -> list[Row]:
    """All rows."""
    with ThreadPoolExecutor(4) as pool:
        wanted = [module for module in QUESTIONS if findable(module.split(".")[0])]
        probes = dict(zip(wanted, pool.map(lambda module: probe(module, timeout), wanted)))
    nothing = Probe({})
    torch = probes.get("torch", nothing)
    engine = engine_row(probes.get("transformer_engine.pytorch", nothing), torch)
    packages = [package_row(name, specifier, probes) for name, specifier in requirements().items()]
    return [
        python_row(),
        *packages,
        gpu_row(torch, "torch" in probes),
        library_row("NCCL", torch, "nccl", "no training on several GPUs; gloo on the CPU"),
        library_row("cuDNN", torch, "cudnn", "no fused attention on a GPU"),
        engine,
        flash_row(probes.get("flash_attn", nothing), engine),
        apex_row(probes.get("apex", nothing)),
        optional_row("transformers", "nothing in training; tests and some benchmarks compare with it", "test"),
        optional_row("hydra-submitit-launcher", "no sweeps through Slurm (hydra/launcher=slurm)", "slurm"),
        tokenizer_row(tokenizer),
        memory_row(),
        nvcc_row(),
        disk_row(Path.cwd()),
    ]


def guarded(make: Callable[[], list[Row]]) -> list[Row]:
    """The rows, or one row that reports the doctor's own failure."""
    try:
        return make()
    except Exception as error:
        return [Row("doctor", STOPS, f"{type(error).__name__}: {error}", "nothing was checked", "report this line")]


def table(rows: list[Row]) -> str:
    """The rows as text for a terminal."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.state:5}  {row.name:{width}}  {row.found}")
        below = (("costs", row.costs), ("fix", row.fix))
        lines += [f"{'':{width + 7}}  {what}: {text}" for what, text in below if text]
    stops = [row.name for row in rows if row.state == STOPS]
    lines.append(f"training is impossible: {', '.join(stops)}" if stops else "training is possible")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print the table; returns 0 if training is possible, else 1."""
    parser = argparse.ArgumentParser(prog="python -m nvlm.doctor", description=nvlm.doctor.__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", metavar="DIR", help="also check this folder's tokenizer.json")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for a package's import")
    options = parser.parse_args(arguments)
    rows = guarded(lambda: examine(options.tokenizer, options.timeout))
    print(table(rows))
    return int(any(row.state == STOPS for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
