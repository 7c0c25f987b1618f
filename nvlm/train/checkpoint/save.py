"""Checkpoints with Megatron's dist_checkpointing: written while training continues, complete or not at all.

A run folder holds `checkpoints/step_00000200/` with what changes, `checkpoints/frozen/` with the weights that do not,
and `checkpoints/latest` and `checkpoints/best`, each one line with a step's name. The frozen encoder is nowhere: it is
read again from its source. A save has three phases: `save` takes the snapshot (a forked process, whose memory later
steps do not change), the fork writes the files, and `poll` publishes them under their final name once all ranks have
written theirs.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from nvlm.config.values import ConfigError, TrainConfig, problem
from nvlm.processes import groups
from nvlm.runs.digests import MANIFEST, digest, write_manifest
from nvlm.runs.files import write_whole
from nvlm.runs.folder import BEST, FROZEN, LATEST, latest, steps_of
from nvlm.runs.sinks import spared
from nvlm.train.checkpoint.state import adam_step, model_state, optimizer_state, stored
from nvlm.train.checkpoint.writer import Writer
from nvlm.train.guard import BrokenRun
from nvlm.train.step import Trainer, settle


class Checkpoints:
    """Saves the checkpoints of one run: a context manager around its loop. All methods are collective calls."""

    def __init__(self, config: TrainConfig, run_dir: Path, ends: Sequence[int] = ()) -> None:
        """`ends`: former values of train.steps of a run that was extended."""
        self.config, self.root = config, run_dir / "checkpoints"
        self.queue, self.failure, self.ends = AsyncCallsQueue(), None, tuple(ends)
        self.step_writer = Writer()
        self.has_frozen = latest(run_dir) is not None and (self.root / FROZEN).is_dir()
        self.chosen: str | None = None  # becomes the best checkpoint once it is complete

    def __enter__(self) -> Checkpoints:
        if groups.is_first_rank():
            for cut_short in self.root.glob(".*.partial"):
                shutil.rmtree(cut_short, ignore_errors=True)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, ConfigError | BrokenRun):  # all ranks raise these, so they can finish together
            self.poll(wait=True)
        else:
            for call in self.queue.async_calls:
                call.async_caller.close(abort=True)

    def save(self, trainer: Trainer, step: int, extra: dict[str, float] | None = None) -> None:
        """Begin to write the state after `step` steps, with `extra` numbers from the loop."""
        self.poll(wait=True)
        self.failure = None
        settle(trainer)
        updates = _over_ranks(adam_step(trainer))
        learns, frozen = model_state(trainer)
        if not self.config.save_frozen and not self.has_frozen and any(_over_ranks(sum(map(len, frozen.values())))):
            self._write(FROZEN, frozen, Writer(), wait=True)
            self.has_frozen = self.failure is None
        if self.failure is not None:
            return
        weights = stored(learns)
        if self.config.save_frozen:
            weights = {name: chunk | frozen[name] for name, chunk in weights.items()}
        state = weights | optimizer_state(trainer, learns)
        state["run"] = {
            "step": step,
            "adam_step": max(updates),
            "schedule": trainer.schedule.state_dict(),
            "extra": dict(extra or {}),
            "ends": self.ends,
        }
        self._write(f"step_{step:08d}", state, self.step_writer, wait=not self.config.async_save)

    def poll(self, wait: bool = False) -> None:
        """Publish the pending checkpoint if all ranks have written it; with `wait`, wait until they have."""
        self.queue.maybe_finalize_async_calls(blocking=wait)

    def keep_best(self, trainer: Trainer, step: int, extra: dict[str, float] | None = None) -> None:
        """Name the state after `step` steps as the run's best checkpoint, which is kept beside the newest ones. It is
        saved if no checkpoint was due."""
        self.poll(wait=True)
        self.chosen = f"step_{step:08d}"
        if groups.from_first_rank((self.root / self.chosen).is_dir()):
            self._mark_best()
        else:
            self.save(trainer, step, extra)

    def _mark_best(self) -> None:
        if groups.is_first_rank():
            with spared(str(self.root / BEST)):
                write_whole(self.root / BEST, f"{self.chosen}\n")

    def close(self) -> None:
        """Finish the last save. Raises ConfigError if it failed."""
        self.poll(wait=True)
        if self.failure is not None:
            older = "the previous one is intact" if (self.root / "latest").is_file() else "there is no older one"
            fix = "free space, then resume=auto"
            raise problem("last checkpoint of the run", self.failure, f"a complete save ({older})", fix)

    def _write(self, name: str, state: dict, writer: Writer, wait: bool) -> None:
        folder = self.root / f".{name}.partial"
        if self._on_first_rank(name, functools.partial(_make_empty, folder)):
            return
        request = writer.request(state, folder, functools.partial(self._finish, name, writer))
        if wait:
            request.execute_sync()
        else:
            self.queue.schedule_async_request(request)

    def _finish(self, name: str, writer: Writer) -> None:
        written = _over_ranks(writer.written())
        refused = [f"{part} (rank {rank})" for rank, part in enumerate(written) if isinstance(part, str)]
        self._on_first_rank(name, functools.partial(self._publish, name, writer, written), refused)

    def _publish(self, name: str, writer: Writer, written: list) -> None:
        folder = self.root / f".{name}.partial"
        writer.write_metadata(folder, [results for results, _ in written])
        known = {file: entry for _, digests in written for file, entry in digests.items()}
        manifest = self.root / FROZEN / MANIFEST
        bound = self.has_frozen and not self.config.save_frozen and name != FROZEN
        write_manifest(folder, known, digest(manifest).sha256 if bound else None)
        shutil.rmtree(self.root / name, ignore_errors=True)
        folder.rename(self.root / name)
        if name != FROZEN:
            write_whole(self.root / LATEST, name + "\n")
            if name == self.chosen:
                self._mark_best()
            kept = _named(self.root / BEST)
            older = [step for step in steps_of(self.root) if step.name < name]
            for old in older[: max(0, len(older) + 1 - self.config.keep)]:
                if old.name != kept:
                    _remove(old)

    def _on_first_rank(self, name: str, action, refused: list[str] = ()) -> str | None:
        """Run `action` on the first rank, unless `refused`, and report a failure there; all ranks return the reason."""
        failure = [refused[0] if refused else None]
        if groups.is_first_rank():
            folder = self.root / f".{name}.partial"
            try:
                if not refused:
                    action()
            except OSError as error:
                failure = [str(error)]
            if failure[0]:
                free = shutil.disk_usage(self.root if self.root.exists() else self.root.parent).free
                failure = [f"{failure[0]}; {free / 1e6:.1f} MB free in {self.root}"]
                shutil.rmtree(folder, ignore_errors=True)
                print(f"checkpoint {name} was not saved: {failure[0]}", file=sys.stderr, flush=True)
        dist.broadcast_object_list(failure, src=0)
        self.failure = failure[0] or self.failure
        return failure[0]


def _named(mark: Path) -> str | None:
    return mark.read_text().strip() if mark.is_file() else None


def _remove(folder: Path) -> None:
    """Delete a checkpoint: renamed at once, removed by a thread while training continues."""
    aside = folder.with_name(f".{folder.name}.partial")
    with contextlib.suppress(OSError):  # a leftover checkpoint is no failed save
        folder.rename(aside)
        threading.Thread(target=shutil.rmtree, args=(aside, True)).start()


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _over_ranks(value) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
