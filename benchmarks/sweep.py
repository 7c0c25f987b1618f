"""Runs an hour of a sweep side by side, compared with one after another, on the cores of this machine.

    python benchmarks/sweep.py [--runs 4] [--rounds 3] [--ways side threads=1 threads=all] [-- train.steps=100 ...]

All ways are whole commands, `launch/train.py -m seed=1,2,... jobs=N`, starts and checkpoints included. One after
another, a run has either all cores, as if it were alone, or one thread, which is what it has side by side. The ways
take turns, and a ratio is the median over rounds. Where other programs use the machine, too, only the one-thread ratio
means anything: threads of one run that wait for each other spin, and lose much more than one thread does.
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


WAYS = {"side": (), "threads=1": ("jobs=1", "train.threads=1"), "threads=all": ("jobs=1",)}
"""Words by way: side by side, and one after another."""


def main() -> None:
    """Print each round, and the median ratio of side by side to each other way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("words", nargs="*", default=DEFAULT)
    options = parser.parse_args()
    rounds = []
    for number in range(options.rounds):
        order = options.ways if number % 2 == 0 else options.ways[::-1]
        costs = {way: measure(options.runs, [*options.words, *WAYS[way]]) for way in order}
        for way, cost in costs.items():
            per_hour, cpu = 3600 * options.runs / cost.wall, cost.cpu / options.runs
            print(f"{way}: {per_hour:.1f} runs an hour, {cpu:.1f} CPU seconds a run", flush=True)
        rounds.append(costs)
    for way in [way for way in options.ways if way != "side"]:
        ratio = statistics.median(costs[way].wall / costs["side"].wall for costs in rounds)
        print(f"side by side / {way}: {ratio:.2f}, of {options.rounds} rounds")
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
