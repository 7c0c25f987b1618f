"""A checkpoint back into a trainer of any layout, or a refusal that says what is wrong and what to use instead."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

from nvlm.config import problem
from nvlm.train.checkpoint import FROZEN, steps_of
from nvlm.train.digests import MANIFEST, digest, faults, frozen_digest
from nvlm.train.state import model_state, optimizer_state, restore_optimizer
from nvlm.train.step import Trainer


def load(trainer: Trainer, folder: Path) -> tuple[int, dict[str, float]]:
    """Restore `trainer` from `folder`: the number of steps behind it, and the loop's numbers saved with it.

    All processes call it together. Raises ConfigError where a file is not what was written, of which nothing is
    unpickled, or where the state does not fit this trainer.
    """
    _verify(folder)
    model, frozen = model_state(trainer)
    wanted = model | optimizer_state(trainer, model)
    if frozen_digest(folder) is None:
        state = _read(folder, wanted | {name: model[name] | frozen[name] for name in model})
    else:
        weights = _read(folder.parent / FROZEN, frozen)
        state = _read(folder, wanted)
        state |= {name: state[name] | weights.get(name, {}) for name in model}
    for number, chunk in enumerate(trainer.chunks):
        chunk.module.load_state_dict(state[f"model{number}"])
    run = state["run"]
    restore_optimizer(trainer, model, state, run["adam_step"])
    trainer.schedule.load_state_dict(run["schedule"])
    return run["step"], run["extra"]


def _verify(folder: Path) -> None:
    wrong = _wrong(folder)
    if not wrong:
        return
    mark = folder.parent / "latest"
    for other in reversed(steps_of(folder.parent)):
        if other.name < folder.name and not _wrong(other):
            fix = f"write {other.name}, which is whole, into {mark} and go on from there with resume=auto"
            break
    else:
        fix = f"restore it from a copy (no older checkpoint is whole), or delete {mark} to begin anew"
    raise problem(f"checkpoint {folder}", "; ".join(wrong), "the files as they were written", fix)


def _wrong(folder: Path) -> list[str]:
    """Faults of a step folder and of the frozen weights that it goes with."""
    if wrong := faults(folder):
        return wrong
    if (bound := frozen_digest(folder)) is None:
        return []
    frozen = folder.parent / FROZEN
    if wrong := faults(frozen):
        return [f"{FROZEN}: {fault}" for fault in wrong]
    return [] if digest(frozen / MANIFEST).sha256 == bound else [f"{FROZEN} holds the weights of another run"]


def _read(folder: Path, wanted: dict) -> dict:
    _compare(folder, wanted)
    # A weight may be held by several pipeline stages, which the check of Megatron would not allow.
    return dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)


def _compare(folder: Path, wanted: dict) -> None:
    """Raise ConfigError unless `folder` holds just the tensors that all processes want, in their shapes."""
    entries = [entry for entry in nested_values(load_preprocess(wanted)[0]) if isinstance(entry, ShardedTensor)]
    parts = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, {entry.key: tuple(entry.global_shape) for entry in entries})
    want = {key: shape for part in parts for key, shape in part.items()}
    metadata = dist_checkpointing.load_tensors_metadata(str(folder))
    have = {key: tuple(entry.global_shape) for key, entry in metadata.items()}
    wrong = [f"no {key}" for key in want.keys() - have.keys()]
    wrong += [f"{key}, which this run does not have" for key in have.keys() - want.keys()]
    wrong += [
        f"{key} of shape {have[key]} instead of {want[key]}"
        for key in want.keys() & have.keys()
        if have[key] != want[key]
    ]
    if wrong:
        named = "; ".join(sorted(wrong)[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        fix = f"the model, stage and precision of {folder.parent.parent / 'config.yaml'}, or name=OTHER for a new run"
        raise problem(f"checkpoint {folder}", named, "the state of this run, tensor by tensor", fix)
