"""How long a report on 60 runs takes, and how large its page is.

    python benchmarks/report.py [--runs 60] [--questions 300] [--steps 700] [--graded]

Runs are made up in a temporary folder: three architectures, five ways to tile, four seeds, evaluated at four steps,
with built-in pages as held-out records. `--graded`: scores between 0 and 1, as ANLS gives, instead of 0 or 1. Prints
seconds of the whole command, with the interpreter's start, and of its processor time; the median of three.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nvlm.commands.compose import compose_config  # noqa: E402
from nvlm.config.values import Config  # noqa: E402
from tests.sweep_folders import Made, answered, with_seed, write_evaluation, write_run  # noqa: E402

ARCHITECTURES = ("decoder", "xattn", "hybrid")
TILINGS = ("tiling.max_tiles=1", "tiling.tag=none", "tiling.tag=2d_grid", "tiling.tag=2d_bbox", "tiling.tag=1d")


def main() -> None:
    """Run the benchmark."""
    given = parse()
    with tempfile.TemporaryDirectory() as folder:
        for place, config in itertools.islice(configurations(given.steps, Path(folder) / "sweep"), given.runs):
            write(place, config, given)
        command = [sys.executable, str(ROOT / "launch/report.py"), f"runs={folder}/sweep", f"out={folder}/out"]
        walls, used = zip(*(timed(command) for _ in range(3)), strict=True)
        size = (Path(folder) / "out/report.html").stat().st_size
    print(f"{given.runs} runs, {given.questions} questions, {given.steps} steps")
    print(f"{statistics.median(walls):.1f} s, {statistics.median(used):.1f} s of processor time, {size / 1e6:.2f} MB")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--graded", action="store_true")
    return parser.parse_args()


def configurations(steps: int, sweep: Path) -> Iterator[tuple[Path, Config]]:
    """Folders and configurations, seed by seed."""
    seeds = itertools.count(1)
    bases = [((a, t), compose_config(f"arch={a}", t, "train.threads=1")) for a in ARCHITECTURES for t in TILINGS]
    for seed in seeds:
        for (arch, tiling), base in bases:
            yield sweep / f"arch={arch},{tiling},seed={seed}", with_seed(base, seed, steps)


def write(place: Path, config: Config, given: argparse.Namespace) -> None:
    """A run's folder, evaluated at four steps."""
    rng = np.random.default_rng(config.seed)
    names = [f"heldout-{config.seed}-{number}" for number in range(given.questions)]
    made = Made(rate=rng.uniform(0.5, 0.95), done=given.steps, evaluated=(), names=names)
    write_run(place, config, made)
    for quarter in (1, 2, 3, 4):
        rows = answered(made, config.seed, made.rate * quarter / 4)
        if given.graded:
            rows = [row | {"score": float(rng.random())} for row in rows]
        step = given.steps * quarter // 4
        write_evaluation(place / "evaluation/heldout" / f"step_{step:08}", rows, step)


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds of a command, and of its processor time."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
