"""What a run tells: progress bar, metrics.jsonl, TensorBoard, skipped.jsonl. Written by the first process alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from nvlm import device, parallel
from nvlm.config import Config
from nvlm.files import write_whole
from nvlm.flops import model_flops
from nvlm.hardware import known_gpu
from nvlm.train.optim import GroupCount
from nvlm.train.skipped import Tally
from nvlm.train.step import StepResult
from nvlm.vision.balance import shares


class Metrics:
    """Context manager around a training loop. With `active` False it only counts."""

    def __init__(self, config: Config, run_dir: Path, first_step: int, active: bool) -> None:
        self.config, self.active, self.first = config, active, first_step
        self.run_dir, self.step = run_dir, first_step
        self.tally = Tally()
        gpu = known_gpu(device.gpu_name() or "")
        self.peak = gpu and gpu.peak(config.precision.name)

    def __enter__(self) -> Metrics:
        if self.active:
            self.console = Console()
            self.file = _continue(self.run_dir / "metrics.jsonl", self.first)
            self.board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.first)
            self.bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                refresh_per_second=2,
            )
            self.task = self.bar.add_task("first step", total=self.config.train.steps, completed=self.first)
            self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self.active:
            self.bar.stop()
            self.board.close()
            self.file.close()

    def record(self, result: StepResult, phases: Mapping[str, float]) -> None:
        """Log one step. `phases`: seconds of each in this process since the last step was logged, its save included."""
        self.step += 1
        self.tally = self.tally.after(result.records, result.skipped, result.fewer_tiles)
        if self.active:
            self._write(result, phases)

    def _write(self, result: StepResult, phases: Mapping[str, float]) -> None:
        rates = self._rates(result, phases)
        counts = asdict(result) | asdict(result.work)
        row = {"step": self.step, **counts, **rates, "phases": dict(phases), "skipped_updates": result.guard.skipped}
        del row["guard"], row["stop"], row["work"], row["tiles_by_replica"]
        self.file.write(json.dumps(row) + "\n")
        for name in ("loss", "grad_norm", "lr", *rates):
            self.board.add_scalar(name, row[name], self.step)
        for phase, seconds in phases.items():
            self.board.add_scalar(f"seconds/{phase}", seconds, self.step)
        lost = f"skipped {self.tally.skipped}  " if self.tally.skipped else ""
        if self.tally.fewer_tiles:
            lost += f"fewer tiles {self.tally.fewer_tiles}  "
        text = (
            f"loss {result.loss:6.3f}  {lost}{rates['tokens_per_second']:7,.0f} tokens/s  "
            f"{rates['tiles_per_second']:5,.0f} tiles/s  padding {rates['padding']:4.0%}  "
            f"{rates['tflops']:.3g} TFLOP/s"
        )
        if "mfu" in rates:
            text += f"  MFU {rates['mfu']:.1%}"
        if result.guard.skipped:
            text += f"  updates skipped {result.guard.skipped}"
        if not result.updated:
            told = f"step {self.step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}: not learned from"
            self.console.print(told, highlight=False)
        self.bar.update(self.task, completed=self.step, description=text)
        if not self.console.is_terminal and self.step % self.config.train.log_every == 0:
            self.console.print(f"step {self.step}/{self.config.train.steps}  {text}", highlight=False, soft_wrap=True)

    def _rates(self, result: StepResult, phases: Mapping[str, float]) -> dict[str, float]:
        """What a row says beside counts. Speeds are over the whole step; FLOP/s are those of one process's GPU."""
        seconds, work = sum(phases.values()), result.work
        flops = model_flops(self.config, work).total / seconds / parallel.world_size()
        encoded = shares(result.tiles_by_replica, self.config.parallel.replica, self.config.vision.balance)
        rates = {
            "tokens_per_second": work.tokens / seconds,
            "tiles_per_second": work.tiles / seconds,
            "tflops": flops / 1e12,
            "padding": 1 - work.tokens / result.positions,
            "key_padding": 1 - work.keys / result.key_positions if work.keys else 0.0,
            "imbalance_replicas": _imbalance(result.tiles_by_replica),
            "imbalance_ranks": _imbalance(encoded),
            "waiting": phases["data"] / seconds,
            "seconds": seconds,
        }
        return rates | ({"mfu": flops / self.peak} if self.peak else {})


def _imbalance(tiles: Sequence[int]) -> float:
    """The most tiles over their mean; 1 where there are none."""
    return max(tiles) * len(tiles) / sum(tiles) if any(tiles) else 1.0


def _continue(path: Path, step: int) -> TextIO:
    """`path` opened behind the line of `step`: what a killed run did beyond its last checkpoint is done again."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    return open(path, "a", buffering=1)


def append_skipped(run_dir: Path, skipped) -> None:
    """Add (name, reason) pairs to skipped.jsonl; replicas may write at once, each line in one piece."""
    if skipped:
        with open(run_dir / "skipped.jsonl", "a") as file:
            file.write("".join(json.dumps({"record": name, "reason": reason}) + "\n" for name, reason in skipped))


def print_groups(counts: list[GroupCount], stage: str, lr: float, origins: Mapping[str, str]) -> None:
    """The table of what learns, and where its first weights come from (not in a resumed run)."""
    table = Table(title=f"stage {stage}", title_justify="left")
    for heading, justify in (
        ("module group", "left"),
        ("parameters", "right"),
        ("learns", "left"),
        ("peak lr", "right"),
        *([("weights", "left")] if origins else []),
    ):
        table.add_column(heading, justify=justify, overflow="fold")
    for count in counts:
        if count.parameters:
            learns = {0: "frozen", count.parameters: "yes"}.get(count.learning, f"{count.learning:,} in adapters")
            origin = [origins[count.name]] if origins else []
            table.add_row(count.name, f"{count.parameters:,}", learns, f"{lr:g}" if count.learning else "", *origin)
    Console().print(table)
