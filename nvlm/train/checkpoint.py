"""Checkpoints by Megatron's dist_checkpointing: written beside the training, whole or not at all.

A run folder holds `checkpoints/step_00000200/` with what changes, `checkpoints/frozen/` with the weights that do not,
and `checkpoints/latest`, one line with the name of a step. The frozen encoder is in none of them: it is read again
from where it came from. A save goes three ways: `save` takes the snapshot (a forked process, whose memory no later
step changes), the fork writes the files, and `poll` gives them their name once all ranks have written theirs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import shutil
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from nvlm import parallel
from nvlm.config import ConfigError, TrainConfig, problem
from nvlm.train.digests import MANIFEST, Digest, digest, write_manifest, write_whole
from nvlm.train.state import adam_step, model_state, optimizer_state
from nvlm.train.step import Trainer

FROZEN = "frozen"


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    mark = run_dir / "checkpoints" / "latest"
    if not mark.is_file():
        return None
    folder = mark.parent / mark.read_text().strip()
    if not folder.is_dir():
        there = [other.name for other in steps_of(mark.parent)]
        fix = f"write {there[-1]} into it" if there else "delete it to begin anew"
        raise problem(str(mark), folder.name, f"one of {', '.join(there) or 'none'}, which are there", fix)
    return folder


def steps_of(root: Path) -> list[Path]:
    """The step folders below `root`, oldest first."""
    return sorted(root.glob("step_*"))


class Checkpoints:
    """Saves of one run: a context manager around its loop, whose methods all processes call together."""

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        self.config, self.root = config, run_dir / "checkpoints"
        self.queue, self.failure = AsyncCallsQueue(), None
        self.step_writer = _writer()
        self.has_frozen = latest(run_dir) is not None and (self.root / FROZEN).is_dir()

    def __enter__(self) -> Checkpoints:
        if parallel.is_first_rank():
            for cut_short in self.root.glob(".*.partial"):
                shutil.rmtree(cut_short, ignore_errors=True)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, ConfigError):  # raised by all processes, so that they can finish together
            self.poll(wait=True)
        else:
            for call in self.queue.async_calls:
                call.async_caller.close(abort=True)

    def save(self, trainer: Trainer, step: int, extra: dict[str, float] | None = None) -> None:
        """Begin to write the state behind `step` steps, with `extra` numbers of the loop's own."""
        self.poll(wait=True)
        self.failure = None
        updates = _over_ranks(adam_step(trainer))
        learns, frozen = model_state(trainer, frozen=False), model_state(trainer, frozen=True)
        if not self.config.save_frozen and not self.has_frozen and any(_over_ranks(sum(map(len, frozen.values())))):
            self._write(FROZEN, frozen, _writer(), wait=True)
            self.has_frozen = self.failure is None
        if self.failure is not None:
            return
        state = learns | optimizer_state(trainer, learns)
        if self.config.save_frozen:
            state |= {name: chunk | frozen[name] for name, chunk in learns.items()}
        state["run"] = {
            "step": step,
            "adam_step": max(updates),
            "schedule": trainer.schedule.state_dict(),
            "extra": dict(extra or {}),
        }
        self._write(f"step_{step:08d}", state, self.step_writer, wait=not self.config.async_save)

    def poll(self, wait: bool = False) -> None:
        """Give a written checkpoint its name; with `wait`, not before it is written."""
        self.queue.maybe_finalize_async_calls(blocking=wait)

    def close(self) -> None:
        """Finish the last save. Raises ConfigError where it failed."""
        self.poll(wait=True)
        if self.failure is not None:
            older = "the older one is whole" if (self.root / "latest").is_file() else "there is no older one"
            fix = "make room, then resume=auto"
            raise problem("last checkpoint of the run", self.failure, f"it to be written ({older})", fix)

    def _write(self, name: str, state: dict, writer: _Writer | FullyParallelSaveStrategyWrapper, wait: bool) -> None:
        folder = self.root / f".{name}.partial"
        if self._on_first_rank(name, functools.partial(_make_empty, folder)):
            return
        apply_factories(state)
        dict_list_map_inplace(_without_copy, state)
        request = dist_checkpointing.save(
            state,
            str(folder),
            writer,
            validate_access_integrity=False,  # the writer does, once
            async_sharded_save=True,
            async_strategy="mcore",
        )
        request = request._replace(
            finalize_fns=[functools.partial(self._finish, name, getattr(writer, "base_strategy", writer))]
        )
        if wait:
            request.execute_sync()
        else:
            self.queue.schedule_async_request(request)

    def _finish(self, name: str, writer: _Writer) -> None:
        written = _over_ranks(writer.written())
        refused = [f"{part} (rank {rank})" for rank, part in enumerate(written) if isinstance(part, str)]
        self._on_first_rank(name, functools.partial(self._publish, name, writer, written), refused)

    def _publish(self, name: str, writer: _Writer, written: list) -> None:
        folder = self.root / f".{name}.partial"
        writer.storage.finish(writer.metadata, [results for results, _ in written])
        save_config(CheckpointingConfig(writer.backend, writer.version), str(folder))
        known = {file: entry for _, digests in written for file, entry in digests.items()}
        manifest = self.root / FROZEN / MANIFEST
        bound = self.has_frozen and not self.config.save_frozen and name != FROZEN
        write_manifest(folder, known, digest(manifest).sha256 if bound else None)
        shutil.rmtree(self.root / name, ignore_errors=True)
        folder.rename(self.root / name)
        if name != FROZEN:
            write_whole(self.root / "latest", name + "\n")
            older = [step for step in steps_of(self.root) if step.name < name]
            for old in older[: max(0, len(older) + 1 - self.config.keep)]:
                _remove(old)

    def _on_first_rank(self, name: str, action, refused: list[str] = ()) -> str | None:
        """Let the first process act, unless `refused`; all learn what went wrong, if anything, and it says so."""
        failure = [refused[0] if refused else None]
        if parallel.is_first_rank():
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
                print(f"checkpoint {name} is not saved: {failure[0]}", file=sys.stderr, flush=True)
        dist.broadcast_object_list(failure, src=0)
        self.failure = failure[0] or self.failure
        return failure[0]


class _Writer(TorchDistSaveShardedStrategy):
    """Megatron's, with an end of its own.

    Megatron's lets the other ranks wait for ever where rank 0 cannot write the metadata, drops the reason of a failed
    write, and starts a server process to carry results, which outlives a killed run.
    """

    def __init__(self) -> None:
        super().__init__(cached_metadata=True)  # plans once, for the structure stays
        filesystem_async._results_queue = ()  # anything but None: no server

    def _get_save_and_finalize_callbacks(self, storage, planned, async_strategy) -> AsyncRequest:
        self.storage, self.metadata, _ = planned
        self.report = os.fdopen(os.memfd_create("written"), "w+b")  # in memory: a full disk must not silence it
        write, preload, arguments = storage.get_save_function_and_args()
        if write is not None:
            write = functools.partial(_write_files, self.report, write.args[0])
        return AsyncRequest(write, arguments, [], preload_fn=preload)

    def written(self) -> tuple[list, dict[str, Digest]] | str:
        """What this rank's files hold and their digests, or why it could not write them."""
        with self.report as report:
            report.seek(0)
            try:
                return pickle.load(report) if self.storage.write_buckets else ([], {})
            except EOFError:
                return "the writing process ended early"


def _writer() -> _Writer | FullyParallelSaveStrategyWrapper:
    # Spreads what several ranks hold over all of them, so that each tensor is written once.
    several = dist.get_world_size() > 1
    return FullyParallelSaveStrategyWrapper(_Writer(), dist.group.WORLD, True) if several else _Writer()


def _write_files(report, transforms: list, rank: int, buckets: list, _) -> None:
    """Write this rank's files and `report` what they hold; runs in the forked process."""
    try:
        written, digests = [], {}
        for number, bucket in enumerate(buckets):
            _, outcome = filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, number, bucket, None, None, use_fsync=True
            )
            if isinstance(outcome, Exception):
                raise outcome
            written += outcome
            digests[bucket[1]] = digest(Path(bucket[0]))
        pickle.dump((written, digests), report)
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        pickle.dump(str(error), report)
    report.flush()


def _without_copy(entry):
    """A CPU view as a tensor of its own over the same memory: Megatron copies views while the loop stands still."""
    if isinstance(entry, ShardedTensor) and entry.data.device.type == "cpu" and entry.data.is_contiguous():
        flat = entry.data.detach().view(-1).view(torch.uint8)
        memory = torch.from_numpy(flat.numpy())
        entry.data = memory.view(entry.data.dtype).view(entry.data.shape)
    return entry


def _remove(folder: Path) -> None:
    """Delete a checkpoint: out of sight at once, from the disk beside the training."""
    aside = folder.with_name(f".{folder.name}.partial")
    with contextlib.suppress(OSError):  # one checkpoint too many is no failed save
        folder.rename(aside)
        threading.Thread(target=shutil.rmtree, args=(aside, True)).start()


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _over_ranks(value) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
