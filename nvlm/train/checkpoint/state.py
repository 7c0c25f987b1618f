"""A trainer's state as sharded tensors that do not depend on the layout.

Weights are stored under the model's names, Adam's state under `optimizer.state.{param,exp_avg,exp_avg_sq}.<name>`;
`param` is the fp32 copy of a weight of lower precision. Each of Megatron's optimizers would store parameter groups
and steps in its own format, which the others cannot read. So parameter groups are not stored (the configuration
defines them), and Adam's step is one number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nvlm.train.step import Trainer

_ADAM = ("exp_avg", "exp_avg_sq")


def model_state(trainer: Trainer) -> tuple[dict, dict]:
    """The model's state that changes, and its frozen weights, each by chunk: `model0`, `model1`, ... An encoder that
    learns is the last one."""
    parts: tuple[dict, dict] = ({}, {})
    for number, chunk in enumerate(trainer.wrapped):
        entries = chunk.module.sharded_state_dict(metadata=metadata())
        delayed = chunk.config.fp8 and chunk.config.fp8_recipe == "delayed"
        entries = {  # Transformer Engine's modules have an empty entry when there is no scaling history to store
            name: entry
            for name, entry in entries.items()
            if not is_scale(name) or (delayed and isinstance(entry, ShardedObject))
        }
        learns = {name: entry for name, entry in entries.items() if not _is_frozen(entry)}
        frozen = {name: _original(entry) for name, entry in entries.items() if name not in learns}
        for part, found in zip(parts, (learns, frozen)):
            part[f"model{number}"] = found
    return parts


def stored(model: dict) -> dict:
    """`model` without weights that are kept in FP8: their fp32 master weights are in Adam's state."""
    return {
        chunk: {name: entry for name, entry in entries.items() if not is_float8tensor(getattr(entry, "data", None))}
        for chunk, entries in model.items()
    }


def optimizer_state(trainer: Trainer, model: dict) -> dict:
    """Sharded tensors over Adam's state of the weights in `model` that learn."""
    return {
        f"optimizer{number}": _distributed(part, model) if _is_distributed(part) else _plain(part, model)
        for number, part in enumerate(_parts(trainer.optimizer))
    }


def restore_optimizer(trainer: Trainer, model: dict, loaded: dict, step: int) -> None:
    """Set Adam's state to `loaded`, after `step` updates. The model's weights must be restored already."""
    for number, part in enumerate(_parts(trainer.optimizer)):
        state = loaded.get(f"optimizer{number}", {})  # empty dicts are not read back
        if not _is_distributed(part):  # the load itself fills a distributed one, through views
            _restore_plain(part, model, state)
        elif part.ddp_config.fp8_param_gather:
            part._copy_main_params_to_model_params()
        _set_step(part, step)
    for chunk in trainer.chunks:
        if chunk.ddp_config.fp8_param_gather:
            chunk.start_param_sync(force_sync=True)


def adam_step(trainer: Trainer) -> int:
    """Number of updates Adam has made on this rank; 0 if nothing learns here."""
    return max((_step(part) for part in _parts(trainer.optimizer)), default=0)


def is_scale(name: str) -> bool:
    """Whether an entry of a module's state is its FP8 scaling history."""
    return name.endswith("._extra_state")


@contextmanager
def unpickling_scales() -> Iterator[None]:
    """A block in which Transformer Engine unpickles the scaling history of delayed FP8, which newer versions refuse
    without an opt-in. Use it only for a checkpoint whose digests have been verified."""
    before = os.environ.get(_UNPICKLE)
    os.environ[_UNPICKLE] = "1"
    try:
        yield
    finally:
        del os.environ[_UNPICKLE]
        os.environ.update({_UNPICKLE: before} if before is not None else {})


_UNPICKLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def metadata() -> dict:
    """The metadata that Megatron's sharded_state_dict needs: a fresh dict, because Megatron caches a group in it."""
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _is_frozen(entry) -> bool:
    return isinstance(getattr(entry, "data", None), torch.nn.Parameter) and not entry.data.requires_grad


def _original(entry: ShardedTensor | ShardedTensorFactory) -> ShardedTensor | ShardedTensorFactory:
    """A frozen weight that is kept only in FP8 is stored as it was before, which host memory still has."""
    return replace(entry, data=entry.data.get_high_precision_init_val()) if is_float8tensor(entry.data) else entry


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The chained optimizers that have parameters: a pipeline stage may hold nothing that learns."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if part.optimizer is not None]


def _is_distributed(part: MegatronOptimizer) -> bool:
    return isinstance(part, DistributedOptimizer)


def _weights(model: dict) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    return (entry for entry in nested_values(model) if isinstance(getattr(entry, "data", None), torch.nn.Parameter))


def _distributed(part: DistributedOptimizer, model: dict) -> dict:
    """This rank's ranges of Adam's state, as boxes of the whole tensors, without gathering anything.

    Megatron's own layout-independent format gathers every rank's state on each rank while training waits.
    """
    _fill_adam(part)
    state = {}
    for entry in _weights(model):
        if entry.data in part.model_param_group_index_map:
            tensors = part._get_main_param_and_optimizer_states(entry.data)
            kinds = _ADAM if entry.data.dtype == torch.float32 else ("param", *_ADAM)
            start = part._get_model_param_range_map(entry.data)["param"].start
            state[entry.key] = {kind: list(_boxes(entry, kind, tensors[kind], start)) for kind in kinds}
    return state


def _boxes(
    entry: ShardedTensor | ShardedTensorFactory, kind: str, flat: torch.Tensor, start: int
) -> Iterator[ShardedTensor]:
    """`flat`, this rank's range of a weight from element `start` on, as boxes of the whole weight."""
    piece_start = 0
    for piece in [entry] if isinstance(entry, ShardedTensor) else entry.build():
        size = math.prod(piece.local_shape)
        first, last = max(start, piece_start), min(start + len(flat), piece_start + size)
        place = first - start
        for corner, shape in boxes(first - piece_start, last - piece_start, piece.local_shape):
            count = math.prod(shape)
            yield ShardedTensor(
                key=f"optimizer.state.{kind}.{piece.key}",
                data=flat[place : place + count].view(shape),
                dtype=flat.dtype,
                local_shape=shape,
                global_shape=piece.global_shape,
                global_offset=tuple(map(sum, zip(piece.global_offset, corner))),
                axis_fragmentations=None,  # not a regular grid
                replica_id=(*piece.replica_id[:2], 0),  # replicas keep different ranges
            )
            place += count
        piece_start += size


Corner = tuple[int, ...]


def boxes(first: int, last: int, shape: Sequence[int]) -> Iterator[tuple[Corner, Corner]]:
    """Elements `first` to `last` of a tensor of `shape` as boxes (corner, shape), in order: whole rows are one box, a
    partial row at either end is divided like a tensor of one dimension less."""
    if len(shape) == 1:
        if first < last:
            yield (first,), (last - first,)
        return
    inner = math.prod(shape[1:])
    while first < last:
        row, column = divmod(first, inner)
        whole = (last - first) // inner if column == 0 else 0
        if whole:
            yield (row, *[0] * (len(shape) - 1)), (whole, *shape[1:])
            first += whole * inner
            continue
        end = min(last, (row + 1) * inner)
        for corner, part in boxes(column, column + end - first, shape[1:]):
            yield (row, *corner), (1, *part)
        first = end


def _plain(part: MegatronOptimizer, model: dict) -> dict:
    _fill_adam(part)
    return {
        entry.key: {
            name: make_sharded_optimizer_tensor(entry, tensor, f"optimizer.state.{name}")
            for name, tensor in tensors.items()
        }
        for entry, tensors in _adam(part, model)
    }


@torch.no_grad()
def _restore_plain(part: MegatronOptimizer, model: dict, state: dict) -> None:
    for entry, tensors in _adam(part, model):
        for name, tensor in tensors.items():
            tensor.copy_(state[entry.key][name])


def _adam(part: MegatronOptimizer, model: dict) -> Iterator[tuple[ShardedTensor | ShardedTensorFactory, dict]]:
    """Each weight that `part` updates, with its optimizer tensors."""
    for entry in _weights(model):
        main = getattr(entry.data, "main_param", entry.data)
        if main in part.optimizer.state:
            tensors = {name: part.optimizer.state[main][name] for name in _ADAM}
            yield entry, tensors if main is entry.data else {"param": main} | tensors


def _fill_adam(part: MegatronOptimizer) -> None:
    # Adam allocates its state at its first update, but a checkpoint may need it earlier.
    step = _step(part)
    part.init_state_fn(part.optimizer, part.config)
    _set_step(part, step)


def _step(part: MegatronOptimizer) -> int:
    # torch's Adam counts per parameter, Transformer Engine's per group.
    counts = [*part.optimizer.state.values(), *part.optimizer.param_groups]
    return max(int(count.get("step") or 0) for count in counts)


def _set_step(part: MegatronOptimizer, step: int) -> None:
    if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
        for adam in part.optimizer.state.values():
            adam["step"] = torch.tensor(float(step))  # not shared: torch increments it in place for each parameter
    else:
        for group in part.optimizer.param_groups:
            group["step"] = step
