"""Logging of a run: progress bar, metrics.jsonl, TensorBoard, skipped.jsonl. Only the first rank logs steps."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from nvlm.config.hardware import known_gpu
from nvlm.config.values import Config
from nvlm.estimate.flops import model_flops
from nvlm.processes import device, groups
from nvlm.runs.sinks import Appended, json_line, spared
from nvlm.train.optim import GroupCount
from nvlm.train.skipped import Tally
from nvlm.train.step import StepResult
from nvlm.train.tracker import SILENT, Silent, Tracker
from nvlm.vision.prepass import shares


class Metrics:
    """Context manager around a training loop. Unless `active`, it only counts records."""

    def __init__(
        self, config: Config, run_dir: Path, first_step: int, active: bool, tracker: Tracker | Silent = SILENT
    ) -> None:
        self.tracker = tracker
        self.config, self.active, self.first = config, active, first_step
        self.run_dir, self.step = run_dir, first_step
        self.tally = Tally()
        gpu = known_gpu(device.gpu_name() or "")
        self.peak = gpu and gpu.peak(config.precision.name)

    def __enter__(self) -> Metrics:
        if self.active:
            self.console = Console()
            path = self.run_dir / "metrics.jsonl"
            with spared(str(path)):
                keep_steps(path, self.first)
            self.file = Appended(path)
            self.board = Board(self.run_dir / "tensorboard", self.first)
            self.bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                refresh_per_second=2,
                disable=not self.console.is_terminal,
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
        """Log one step. `phases`: seconds in each since the previous step was logged, on this rank, with its save."""
        self.step += 1
        self.tally = self.tally.after(result.records, result.skipped, result.fewer_tiles)
        if self.active:
            self._write(result, phases)

    def scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Log what an evaluation after `step` steps measured."""
        if self.active and scores:
            self.board.write(scores, step)
            self.tracker.log({"step": step} | dict(scores))

    def _write(self, result: StepResult, phases: Mapping[str, float]) -> None:
        rates = self._rates(result, phases)
        counts = asdict(result) | asdict(result.work)
        row = {"step": self.step, **counts, **rates, "phases": dict(phases), "skipped_updates": result.guard.skipped}
        del row["guard"], row["stop"], row["work"], row["tiles_by_replica"]
        self.file.write(json_line(row))
        shown = {name: row[name] for name in ("loss", "grad_norm", "lr", *rates)}
        shown |= {f"seconds/{phase}": seconds for phase, seconds in phases.items()}
        self.board.write(shown, self.step)
        self.tracker.log({"step": self.step} | shown)
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
            why = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
            why = f"step {self.step}: {why if result.trained_tokens else 'no usable record'}: update skipped"
            self.console.print(why, highlight=False)
        self.bar.update(self.task, completed=self.step, description=text)
        due = self.step % self.config.train.log_every == 0 or self.step == self.config.train.steps
        if due and not self.console.is_terminal:
            self.console.print(f"step {self.step}/{self.config.train.steps}  {text}", highlight=False, soft_wrap=True)

    def _rates(self, result: StepResult, phases: Mapping[str, float]) -> dict[str, float]:
        """The derived numbers of a row. Speeds are over the whole step and all ranks; FLOP/s are per GPU."""
        seconds, work = sum(phases.values()) - phases.get("evaluate", 0.0), result.work
        flops = model_flops(self.config, work).total / seconds / groups.world_size()
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
            "peak_memory": device.peak_memory(),
        }
        return rates | ({"mfu": flops / self.peak} if self.peak else {})


def _imbalance(tiles: Sequence[int]) -> float:
    """Maximum over mean; 1 without tiles."""
    return max(tiles) * len(tiles) / sum(tiles) if any(tiles) else 1.0


class Board:
    """Scalars for TensorBoard, written with `Appended`: TensorBoard's own writer thread dies at its first error."""

    def __init__(self, folder: Path, first_step: int) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"  # sorts by time
        self.file = Appended(folder / name)
        self._add(Event(file_version="brain.Event:2"), first_step)
        # Hides steps that an interrupted run made after its last checkpoint.
        self._add(Event(session_log=SessionLog(status=SessionLog.START)), first_step + 1)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Add named values."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(summary=Summary(value=scalars)), step)

    def close(self) -> None:
        """Write what is still buffered."""
        self.file.close()

    def _add(self, event: Event, step: int) -> None:
        event.wall_time, event.step = time.time(), step
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self.file.write(record.getvalue())


def keep_steps(path: Path, step: int) -> None:
    """Truncate the rows in `path` after that of `step`: a resumed run repeats the steps after its checkpoint. An
    incomplete row is dropped as well."""
    if not path.is_file():
        return
    kept = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"}\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
    os.truncate(path, kept)


def skipped_lines(skipped: Sequence[tuple[str, str]]) -> bytes:
    """(name, reason) pairs as lines of skipped.jsonl."""
    return b"".join(json_line({"record": name, "reason": reason}) for name, reason in skipped)


def print_groups(counts: list[GroupCount], stage: str, rates: Mapping[str, float], origins: Mapping[str, str]) -> None:
    """Print a table of what learns, with the optimizer's own `rates`, and, unless the run is resumed, where its initial
    weights come from."""
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
            table.add_row(
                count.name, f"{count.parameters:,}", learns, f"{rates[count.name]:g}" if count.learning else "", *origin
            )
    Console().print(table)
