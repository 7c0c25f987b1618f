"""The mean loss on held-out records, by source, computed like a training step's: in packed rows, in any layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nvlm.arch import registry
from nvlm.config.values import Config
from nvlm.data.blend import Interleaved
from nvlm.data.loader import StepData, Steps
from nvlm.data.outline import build_processor
from nvlm.data.sources.registry import Records
from nvlm.evaluate.stop import Stop, Stopped, never
from nvlm.processes import groups
from nvlm.runs.files import write_whole
from nvlm.train.agree import agreed
from nvlm.train.step import Trainer, forward, summed

FILE = "losses.json"


@dataclass(frozen=True, slots=True)
class Loss:
    """The mean loss per trained token of one source's held-out records; None if they have no such token."""

    loss: float | None
    tokens: int
    records: int
    skipped: int


@dataclass(frozen=True, slots=True)
class InTurn:
    """An order (as nvlm.data.order.Order) in which each record is drawn once, in turn."""

    records: int
    global_batch: int
    seed: int = 0

    def source_of(self, step: int) -> None:
        """All records may share rows."""

    def source(self, record: int) -> int:
        """There is one source."""
        return 0

    def step(self, step: int) -> list[int]:
        """The records of `step`; the last step may have fewer."""
        return list(range(self.records))[step * self.global_batch :][: self.global_batch]


def measure(
    trainer: Trainer, records: Records, config: Config, alive: Callable[[], None], stop: Stop = never
) -> dict[str, Loss]:
    """The loss on the first `evaluate.losses` held-out records of each source. A collective call.

    Tiles are exact, whatever the setting in training. `alive` is called before each batch. Raises Stopped.
    """
    parts = records.records.parts if isinstance(records, Interleaved) else {config.data.source.source: records}
    return {name: _of_source(trainer, _steps(part, config), alive, stop) for name, part in parts.items()}


def _steps(records: Records, config: Config) -> Steps:
    rank, size = groups.data_rank()
    seat, seats = groups.seat()
    order = InTurn(min(config.evaluate.losses, len(records)), config.train.global_batch)
    return Steps(
        records=records,
        order=order,
        processor=build_processor(config, registry.placement_rule(config.arch.name), resize="exact"),
        steps=-(-order.records // order.global_batch),
        micro_batch=config.train.micro_batch,
        row_length=config.data.row_length,
        data_rank=rank,
        data_size=size,
        seat=seat,
        seats=seats,
        multiple=config.row_multiple,
        groups=config.parallel.pipeline if config.parallel.virtual > 1 else 1,
    )


def _of_source(trainer: Trainer, steps: Steps, alive: Callable[[], None], stop: Stop) -> Loss:
    total = dict.fromkeys(("loss", "stop", "tokens", "records", "skipped"), 0.0)
    for step in range(len(steps)):
        alive()
        data = agreed(steps.delivered(step), trainer.vision.team.replica, trainer.device)
        loss = forward(trainer, data.micro_batches) * groups.is_loss_rank()
        own = {"loss": loss, "stop": float(stop())} | _counts(data)
        total = {name: total[name] + value for name, value in summed(own, trainer.device).items()}
        if total["stop"]:
            raise Stopped
    counts = {name: int(total[name]) for name in ("tokens", "records", "skipped")}
    return Loss(total["loss"] / counts["tokens"] if counts["tokens"] else None, **counts)


def _counts(data: StepData) -> dict[str, int]:
    """Counts of a replica's step, from one of its ranks."""
    counts = {
        "tokens": sum(batch.num_trained for batch in data.micro_batches),
        "records": data.records,
        "skipped": len(data.skipped),
    }
    return counts if groups.is_replica_writer() else dict.fromkeys(counts, 0)


def read_losses(run_dir: Path) -> dict[int, dict[str, Loss]]:
    """What a run measured so far, by step and source."""
    path = run_dir / FILE
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text("utf-8"))
    return {int(step): {name: Loss(**one) for name, one in losses.items()} for step, losses in rows.items()}


def add_losses(run_dir: Path, step: int, losses: Mapping[str, Loss]) -> dict[int, dict[str, Loss]]:
    """Add the losses at `step` to the file in `run_dir`; returns all that it holds."""
    measured = read_losses(run_dir) | {step: dict(losses)}
    plain = {step: {name: asdict(one) for name, one in found.items()} for step, found in sorted(measured.items())}
    write_whole(run_dir / FILE, json.dumps(plain, indent=1) + "\n")
    return measured


def told_losses(losses: Mapping[str, Loss], step: int) -> str:
    """One line about the losses at `step`."""
    shown = "  ".join(f"{name} {shown_loss(one)}" for name, one in losses.items())
    skipped = sum(one.skipped for one in losses.values())
    return f"heldout loss at step {step}: {shown}" + (f"  skipped {skipped}" if skipped else "")


def shown_loss(one: Loss | None) -> str:
    """A loss with four digits, or a dash."""
    return "-" if one is None or one.loss is None else f"{one.loss:.4f}"
