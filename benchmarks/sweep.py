"""Runs an hour of a sweep side by side, compared with one after another, on the cores of this machine.

    python benchmarks/sweep.py [--runs 4] [--pairs 3] [-- train.steps=100 ...]

Both ways are whole commands, `launch/train.py -m seed=1,2,... jobs=N`, starts and checkpoints included: N is 1 (each
run has all cores, as if it were alone) or what the sweep chooses itself. They alternate, and the ratio is the median
over pairs. The CPU time of a run says how much of the difference comes from cores that waited: on a machine that other
programs use, too, it is the figure to trust.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ("train.steps=100", "evaluate=none")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a sweep took, in seconds."""

    wall: float
    cpu: float


def measure(runs: int, words: Sequence[str]) -> Cost:
    """The cost of a sweep of `runs` seeds with `words`, in a folder of its own."""
    seeds = ",".join(str(seed) for seed in range(1, runs + 1))
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "-m", f"seed={seeds}", *words]
    with tempfile.TemporaryDirectory() as folder:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    """Print each pair and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("words", nargs="*", default=DEFAULT)
    options = parser.parse_args()
    ratios = []
    for number in range(options.pairs):
        ways = {"one after another": ("jobs=1",), "side by side": ()}
        order = list(ways) if number % 2 == 0 else list(reversed(ways))
        costs = {way: measure(options.runs, [*options.words, *ways[way]]) for way in order}
        for way, cost in costs.items():
            per_hour, cpu = 3600 * options.runs / cost.wall, cost.cpu / options.runs
            print(f"{way}: {per_hour:.1f} runs an hour, {cpu:.1f} CPU seconds a run", flush=True)
        ratios.append(costs["one after another"].wall / costs["side by side"].wall)
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    print(f"ratio {statistics.median(ratios):.2f} (of {options.pairs}) on {cores} cores, load {load:.1f}")


if __name__ == "__main__":
    main()
