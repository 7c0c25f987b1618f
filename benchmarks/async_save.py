"""How long a checkpoint pauses training: `python benchmarks/async_save.py [key=value ...]`.

One process, one model, saved alternately with train.async_save=false and =true. The pause of an asynchronous save is
the time until save() returns plus the time of the poll that finishes it; training steps run in between.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nvlm.commands.compose import compose_config

SIZES = ("llm.hidden=1280", "llm.heads=8", "llm.head_dim=160", "llm.ffn=3840", "llm.layers=4", "data.records=64")
SMALL = ("data.workers=0", "train.global_batch=4", "train.micro_batch=4")
TIMES = 7


def main() -> None:
    """Measure and print the table."""
    config = compose_config(*SIZES, *SMALL, *sys.argv[1:])
    from nvlm.commands.launch import quiet
    from nvlm.data.loader import load_steps
    from nvlm.processes import groups
    from nvlm.train.checkpoint.save import Checkpoints, latest
    from nvlm.train.loop import build_steps, build_trainer
    from nvlm.train.step import train_step

    quiet()
    with groups.distributed(config.parallel, config.seed, config.train.threads) as device:
        trainer = build_trainer(config, device)
        data = next(iter(load_steps(build_steps(config), 0, 0)))
        step = lambda: train_step(trainer, data)  # noqa: E731
        steps = [seconds(step) for _ in range(TIMES)]
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as folder:
            root = Path(folder)
            blocking = Checkpoints(dataclasses.replace(config.train, async_save=False, keep=1), root / "blocking")
            beside = Checkpoints(dataclasses.replace(config.train, async_save=True, keep=1), root / "beside")
            rows = [turn(blocking, beside, trainer, step, number) for number in range(1, TIMES + 1)]
            size = sum(path.stat().st_size for path in latest(root / "beside").iterdir())
    show(rows, steps, size)


def turn(blocking, beside, trainer, step: Callable, number: int) -> tuple[float, float, float, list[float]]:
    """Seconds of the blocking save, the asynchronous save(), the poll that finishes it, and the steps in between."""
    whole = seconds(lambda: blocking.save(trainer, number))
    begin = seconds(lambda: beside.save(trainer, number))
    between = []
    while True:
        between.append(seconds(step))
        poll = seconds(beside.poll)
        if not beside.queue.async_calls:
            return whole, begin, poll, between


def seconds(action: Callable) -> float:
    """Wall time of `action`."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def show(rows: list, steps: list[float], size: int) -> None:
    """Print the medians."""
    whole, begin, poll = (statistics.median(row[n] for row in rows) for n in range(3))
    pause = statistics.median(row[1] + row[2] for row in rows)
    during = statistics.median(one for row in rows for one in row[3])
    table = Table(title=f"a checkpoint of {size / 1e6:.0f} MB, median of {len(rows)}", title_justify="left")
    table.add_column("the loop stands still for")
    table.add_column("seconds", justify="right")
    table.add_row("blocking save", f"{whole:.3f}")
    table.add_row("async save: save()", f"{begin:.3f}")
    table.add_row("async save: finishing poll()", f"{poll:.3f}")
    table.add_row("async save: both", f"{pause:.3f}")
    table.add_row("both / blocking", f"{pause / whole:.1%}")
    table.add_section()
    table.add_row("a training step, nothing being written", f"{statistics.median(steps):.3f}")
    table.add_row("a training step during a write", f"{during:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
