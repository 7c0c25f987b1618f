"""Checkpoints by Megatron's dist_checkpointing: written aside, then named, so that a kill never leaves half of one.

A run folder holds `checkpoints/step_00000200/` and `checkpoints/latest`, one line with such a name. The frozen
encoder is not in it: it is read again from where it came from.
"""

from __future__ import annotations

import functools
import os
import queue
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer

from nvlm import parallel
from nvlm.config import ConfigError
from nvlm.train.step import Trainer


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    mark = run_dir / "checkpoints" / "latest"
    if not mark.is_file():
        return None
    folder = mark.parent / mark.read_text().strip()
    if not folder.is_dir():
        raise ConfigError(f"{mark} names {folder.name}, which is not there. Fix: restore it, or delete {mark}")
    return folder


def save(trainer: Trainer, step: int, run_dir: Path, keep: int, extra: dict) -> None:
    """Write the state behind `step` steps and the plain values `extra`; all processes call it together."""
    root = run_dir / "checkpoints"
    name = f"step_{step:08d}"
    partial = root / f".{name}.partial"
    if parallel.is_first_rank():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    # Megatron would start a server process for it, which outlives a killed rank; the writer is this very process.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(_state(trainer, step) | {"extra": extra}, str(partial), content_metadata=_metadata())
    dist.barrier()
    if parallel.is_first_rank():
        shutil.rmtree(root / name, ignore_errors=True)
        partial.rename(root / name)
        _write_whole(root / "latest", name + "\n")
        for old in sorted(root.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load(trainer: Trainer, folder: Path) -> tuple[int, dict]:
    """Restore `trainer` from `folder`; returns the number of steps behind it and what was saved as `extra`."""
    _fill_adam(trainer.optimizer)
    _leave_steps(trainer.optimizer)
    state = dist_checkpointing.load(_state(trainer, 0, loading=True), str(folder))
    for number, chunk in enumerate(trainer.chunks):
        chunk.module.load_state_dict(state[f"model{number}"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    _own_steps(trainer.optimizer)
    trainer.schedule.load_state_dict(state["schedule"])
    return state["step"], state["extra"]


def _metadata() -> dict:
    # Megatron caches a group in it, so each call gets a fresh one.
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _state(trainer: Trainer, step: int, loading: bool = False) -> dict:
    chunks = {f"model{n}": c.module.sharded_state_dict(metadata=_metadata()) for n, c in enumerate(trainer.chunks)}
    optimizer = trainer.optimizer.sharded_state_dict(dict(chunks), is_loading=loading, metadata=_metadata())
    return chunks | {"optimizer": optimizer, "schedule": trainer.schedule.state_dict(), "step": step}


def _torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one.optimizer for one in chained if one.optimizer is not None]


def _fill_adam(optimizer: MegatronOptimizer) -> None:
    # A fresh torch Adam has no state yet, and Megatron's loader expects the places to be there.
    for one in _torch_optimizers(optimizer):
        for group in one.param_groups:
            for parameter in group["params"]:
                if not one.state[parameter]:
                    one.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _leave_steps(optimizer: MegatronOptimizer) -> None:
    # The distributed optimizer restores every tensor of torch Adam's state, `step` too, which its checkpoints leave
    # out: a place without a tensor is one that it passes over.
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        restore = getattr(one, "_set_main_param_and_optimizer_states", None)
        if restore is not None:
            one._set_main_param_and_optimizer_states = functools.partial(_restore_but_step, restore)


def _restore_but_step(restore, parameter: torch.Tensor, tensors: dict) -> None:
    restore(parameter, {"step": None} | tensors)


def _own_steps(optimizer: MegatronOptimizer) -> None:
    # Megatron restores one `step` tensor and lets all parameters share it; torch Adam would then advance it once a
    # parameter. Each gets its own.
    for one in _torch_optimizers(optimizer):
        for state in one.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def _write_whole(path: Path, text: str) -> None:
    """Replace `path` by `text` at once: a reader sees the old or the new, never a part."""
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
