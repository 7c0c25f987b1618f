"""Loads a checkpoint into a trainer of any layout, or refuses it and says what is wrong and what to use instead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.fp8_utils import is_float8tensor

from nvlm.arch.base import VisionLanguageModel
from nvlm.arch.groups import parameter_group
from nvlm.config.values import GROUPS, problem
from nvlm.runs.digests import checkpoint_faults, faults, frozen_digest
from nvlm.runs.folder import FROZEN, steps_of, weight_keys
from nvlm.train.checkpoint.state import (
    is_scale,
    metadata,
    model_state,
    optimizer_state,
    restore_optimizer,
    stored,
    unpickling_scales,
)
from nvlm.train.optim import take_up
from nvlm.train.step import Trainer
from nvlm.vision.source import ENCODER_WEIGHTS
from nvlm.weights.merge import is_adapter

_ADAPTERS = "adapters of "  # followed by a module group
_ROW_END = "projector.row_end"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a checkpoint holds besides tensors.

    `ends`: the former values of train.steps of a run that was extended, oldest first. `rates`: the next step's
    learning rate on the former schedule and on this run's.
    """

    step: int  # steps completed
    numbers: dict[str, float]  # the guard's state
    ends: tuple[int, ...]
    rates: tuple[float, float]


def load(trainer: Trainer, folder: Path) -> Loaded:
    """Restore `trainer` from `folder`.

    A collective call. Raises ConfigError if a file is not as it was written (before anything is unpickled) or if the
    state does not fit this trainer.
    """
    _verify(folder)
    model, frozen = model_state(trainer)
    if any(is_scale(name) for entries in model.values() for name in entries):
        kept = load_sharded_metadata(str(folder))
        model = {  # a run resumed in another precision starts with fresh scales
            chunk: {name: entry for name, entry in entries.items() if not is_scale(name) or entry.unique_key in kept}
            for chunk, entries in model.items()
        }
    have = _shapes_in(folder)
    keys = weight_keys(have)
    weights = {  # weights that were kept only in FP8 are stored as their fp32 copies, under other keys
        chunk: {name: replace(entry, key=keys.get(entry.key, entry.key)) for name, entry in entries.items()}
        for chunk, entries in stored(model).items()
    }
    made = {entry.key for chunk in model for name, entry in model[chunk].items() if name not in weights[chunk]}
    have = {key: shape for key, shape in have.items() if key not in made}
    wanted = weights | optimizer_state(trainer, model)
    if frozen_digest(folder) is None:
        state = _read_all(folder, have, wanted | {name: weights[name] | frozen[name] for name in model})
    else:
        beside = folder.parent / FROZEN
        still = _read_all(beside, _shapes_in(beside), frozen)
        state = _read_all(folder, have, wanted)
        state |= {name: state.get(name, {}) | still.get(name, {}) for name in model}  # empty dicts are not read back
    for number, chunk in enumerate(trainer.wrapped):
        with unpickling_scales():
            missing, unexpected = chunk.module.load_state_dict(state[f"model{number}"], strict=False)
        known = model[f"model{number}"].keys() - weights[f"model{number}"].keys()  # made from the optimizer's copies
        assert not unexpected and all(is_scale(name) or name in known for name in missing), (missing, unexpected)
        if any(is_float8tensor(weight) for weight in chunk.module.parameters()):
            from nvlm.llm.fp8 import take_originals

            take_originals(chunk.module, state[f"model{number}"])
    run = state["run"]
    restore_optimizer(trainer, model, state, run["adam_step"])
    ends, planned = tuple(run.get("ends", ())), run["schedule"]["lr_decay_steps"]
    rates = take_up(trainer.schedule, run["schedule"])
    if planned != trainer.schedule.lr_decay_steps:
        ends = (*ends, planned)
    return Loaded(run["step"], run["extra"], ends, rates)


def load_weights(parts: Sequence[VisionLanguageModel], folder: Path, new: Sequence[str] = ()) -> list[str]:
    """Fill `parts`, a model of any layout, from the weights in `folder`, without encoder, optimizer and schedule.

    A collective call. `new`: module groups that may be missing from the checkpoint as a whole; returns those that are.
    A group's adapters may be missing too, since fresh ones add zero, and so may the vector that ends the rows of
    feature maps, as a stage with maps may follow one without. Raises ConfigError as `load` does.
    """
    _verify(folder)
    state = {f"model{number}": part.sharded_state_dict(metadata=metadata()) for number, part in enumerate(parts)}
    places = [folder] if frozen_digest(folder) is None else [folder, folder.parent / FROZEN]
    have = {place: _weights_in(place) for place in places}
    present = _groups_in(key for keys in have.values() for key in keys)
    absent = sorted({*new, _ROW_END, *(_ADAPTERS + group for group in GROUPS)} - present)
    wanted = {
        name: {key: entry for key, entry in part.items() if _group(key) not in absent} for name, part in state.items()
    }
    held = {key: shape for keys in have.values() for key, (_, shape) in keys.items()}
    _refuse(folder, _differences(_shapes(wanted), held))
    loaded: dict[str, dict] = {name: {} for name in state}
    for place, keys in have.items():
        here = {
            name: {key: replace(e, key=keys[e.key][0]) for key, e in part.items() if _key(e) in keys}
            for name, part in wanted.items()
        }
        tensors = _read(place, here)
        loaded = {name: part | tensors.get(name, {}) for name, part in loaded.items()}
    for number, part in enumerate(parts):
        missing = part.load_state_dict(loaded[f"model{number}"], strict=False).missing_keys
        assert all(is_scale(key) or _group(key) in absent for key in missing), missing
    return [group for group in absent if group in GROUPS]


def _group(key: str) -> str:
    """A module group, its adapters, or the vector that ends rows, which is a part of the projector by itself."""
    return _ROW_END if key == _ROW_END else (_ADAPTERS if is_adapter(key) else "") + parameter_group(key)


def _groups_in(keys: Iterable[str]) -> set[str]:
    """The groups of a checkpoint's weights. `_differences` names those that no group has, as what the run lacks."""
    found = set()
    for key in keys:
        with contextlib.suppress(ValueError):
            found.add(_group(key))
    return found


def _verify(folder: Path) -> None:
    wrong = checkpoint_faults(folder, faults)
    if not wrong:
        return
    mark = folder.parent / "latest"
    for other in reversed(steps_of(folder.parent)):
        if other.name < folder.name and not checkpoint_faults(other, faults):
            fix = f"write {other.name}, which is intact, into {mark} and resume from it with resume=auto"
            break
    else:
        fix = f"restore it from a copy (no older checkpoint is intact), or delete {mark} to start over"
    raise problem(f"checkpoint {folder}", "; ".join(wrong), "the files as they were written", fix)


def _read_all(folder: Path, have: dict[str, tuple[int, ...]], wanted: dict) -> dict:
    """Read `wanted` from `folder`; refused unless that is exactly what the folder is said to `have`."""
    _refuse(folder, _differences(_shapes(wanted), have))
    return _read(folder, wanted)


def _read(folder: Path, wanted: dict) -> dict:
    # Several pipeline stages may hold the same weight, which Megatron's check would not allow.
    return dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)


def _key(entry) -> str | None:
    return getattr(entry, "key", None)


def _shapes(wanted: dict) -> dict[str, tuple[int, ...]]:
    """Global shapes of all tensors that any rank wants, by key."""
    entries = [entry for entry in nested_values(load_preprocess(wanted)[0]) if isinstance(entry, ShardedTensor)]
    parts = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, {entry.key: tuple(entry.global_shape) for entry in entries})
    return {key: shape for part in parts for key, shape in part.items()}


def _shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    metadata = dist_checkpointing.load_tensors_metadata(str(folder))
    return {key: tuple(entry.global_shape) for key, entry in metadata.items()}


def _weights_in(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The model's tensors in `folder`, without the encoder's: by name, the key it is stored under and its shape."""
    shapes = _shapes_in(folder)
    named = weight_keys(shapes).items()
    return {name: (key, shapes[key]) for name, key in named if not name.startswith(ENCODER_WEIGHTS)}


def _differences(want: dict[str, tuple[int, ...]], have: dict[str, tuple[int, ...]]) -> list[str]:
    wrong = [f"no {key}" for key in want.keys() - have.keys()]
    wrong += [f"{key}, which this run does not have" for key in have.keys() - want.keys()]
    shared = want.keys() & have.keys()
    return wrong + [f"{key} of shape {have[key]} instead of {want[key]}" for key in shared if have[key] != want[key]]


def _refuse(folder: Path, wrong: list[str]) -> None:
    """Raise ConfigError if anything is `wrong` with the tensors of `folder`."""
    if wrong:
        named = "; ".join(sorted(wrong)[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        fix = f"the model, stage and precision of {folder.parent.parent / 'config.yaml'}, or name=OTHER for a new run"
        raise problem(f"checkpoint {folder}", named, "the state of this run, tensor by tensor", fix)
