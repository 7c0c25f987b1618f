"""Questions per second answered in batches compared with one by one, on the tiny models.

    python benchmarks/evaluate.py [--checkpoint runs/NAME] [--tokens 16] [--questions 150] [--batch 32] [--repeats 3]

Without a checkpoint, the weights are random and no token ends an answer, so that each has all its `--tokens`. Both
variants are `evaluate`, with its reading, encoding and scoring, alternate in one process, and must give the same
answers in fp32. Figures are medians over the repeats of questions per second, for an otherwise idle machine: a batch
uses all cores, and the next one is read meanwhile. "Speed-up" is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from dataclasses import replace

from nvlm.commands import launch
from nvlm.commands.checkpoint import parse
from nvlm.commands.compose import compose_config
from nvlm.config.values import Config
from nvlm.evaluate import answer
from nvlm.evaluate.score import Row
from nvlm.evaluate.task import evaluate
from nvlm.evaluate.tasks import build_task
from nvlm.generate.decode import continue_rows
from nvlm.generate.generator import Generator, build_generator
from nvlm.processes import groups

ARCHITECTURES = ("decoder", "xattn", "hybrid")


def configs(options: argparse.Namespace) -> dict[str, Config]:
    """What is measured, by name."""
    settings = (f"precision={options.precision}", f"data.heldout_records={options.questions}")
    settings = (*settings, f"evaluate.max_new_tokens={options.tokens}")
    if options.checkpoint:
        config = parse([f"checkpoint={options.checkpoint}", *settings]).config
        return {config.arch.name: config}
    return {arch: compose_config(f"arch={arch}", *settings) for arch in ARCHITECTURES}


def timed(model: Generator, config: Config, batch: int) -> tuple[float, list[Row]]:
    """Seconds, and the answers."""
    asked = replace(config.evaluate, batch=batch, questions=None)
    model = replace(model, config=replace(config, evaluate=asked), untrained=())
    task = build_task("heldout", model.config)
    began = time.perf_counter()
    rows = evaluate(model, task).rows
    return time.perf_counter() - began, list(rows.values())


def measure(config: Config, options: argparse.Namespace) -> tuple[float, float, bool]:
    """Questions per second one by one and in batches, and whether the answers are the same."""
    seconds: dict[int, list[float]] = {1: [], options.batch: []}
    same = True
    with groups.distributed(config.parallel, config.seed, options.threads) as device:
        with contextlib.redirect_stdout(sys.stderr):  # its progress
            model = build_generator(config, device)
        timed(model, config, options.batch)  # warm up
        for _ in range(options.repeats):
            found = {batch: timed(model, config, batch) for batch in seconds}
            for batch, (took, _) in found.items():
                seconds[batch].append(took)
            same = same and found[1][1] == found[options.batch][1]
    alone, together = (options.questions / statistics.median(times) for times in seconds.values())
    return alone, together, same


def main() -> int:
    """Print the table; returns 1 if answers differ in fp32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the processor; by default one per core")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    launch.quiet()
    if not options.checkpoint:
        answer.continue_rows = lambda pipeline, batch, sampling, ends, *rest: continue_rows(
            pipeline, batch, sampling, (), *rest
        )
    print(f"{options.questions} questions, batches of {options.batch}, answers of {options.tokens} tokens at most")
    print("| arch | one by one, questions/s | in batches, questions/s | speed-up | same answers |")
    print("|---|---|---|---|---|")
    good = True
    for arch, config in configs(options).items():
        alone, together, same = measure(config, options)
        good &= same or options.precision != "fp32"
        numbers = f"{alone:.1f} | {together:.1f} | {together / alone:.1f}x"
        print(f"| {arch} | {numbers} | {'yes' if same else 'no'} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
