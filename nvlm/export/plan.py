"""What an export writes, tensor by tensor and in this order, and where each tensor comes from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor

from nvlm.config.values import Config
from nvlm.export.layouts.form import EncoderPart
from nvlm.export.shards import DTYPES, Planned
from nvlm.export.trained import TrainedWeights
from nvlm.inputs.sources import whole_groups
from nvlm.weights.layouts import Layout
from nvlm.weights.parts import Part
from nvlm.weights.published import Stored

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of an export, in a subfolder ("": the folder itself). `read` gives it in any precision."""

    folder: str
    planned: Planned
    read: Callable[[], Tensor]


def of_encoder(parts: Sequence[EncoderPart], layout: Layout, like: Mapping[str, Stored]) -> list[Entry]:
    """The encoder's tensors, in the precision of their files unless `like` has another."""
    by_name: dict[str, list[EncoderPart]] = {}
    for one in parts:
        by_name.setdefault(layout.vision[0] + one.written.name, []).append(one)
    return [
        Entry(
            layout.folders.get("vision", ""),
            _planned(name, _stored(some[0]).dtype, some[0].written.shape, like),
            functools.partial(_original, some),
        )
        for name, some in by_name.items()
    ]


def of_trained(
    config: Config, weights: TrainedWeights, layout: Layout, rows: int, like: Mapping[str, Stored]
) -> list[Entry]:
    """All other tensors, in the order of the checkpoint's files. `rows`: of embedding and output layer."""
    found = []
    for group, parts in whole_groups(config, (), layout).items():
        for part in parts:
            shape = (rows, *part.shape[1:]) if part.padded else part.shape
            planned = _planned(part.name, _NAMES[weights.dtype(part.ours)], shape, like)
            entry = Entry(layout.folders.get(group, ""), planned, functools.partial(_trained, part, weights, shape[0]))
            found.append((weights.place(part.ours), entry))
    return [entry for _, entry in sorted(found, key=lambda one: one[0])]


def _planned(name: str, dtype: str, shape: tuple[int, ...], like: Mapping[str, Stored]) -> Planned:
    wanted = like[name].dtype if name in like else dtype
    return Planned(name, wanted if wanted in DTYPES else dtype, shape)


def _trained(part: Part, weights: TrainedWeights, rows: int) -> Tensor:
    return grown(part.target(weights.read(part.ours)).reshape(part.shape), rows)


def grown(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` with more rows, which are the mean of all, so that no untrained word is ever the likeliest."""
    if rows == len(tensor):
        return tensor
    mean = tensor.float().mean(0).to(tensor.dtype)
    return torch.cat((tensor, mean.expand(rows - len(tensor), *mean.shape)))


def _stored(part: EncoderPart) -> Stored:
    return part.source.stored[part.read.name]


def _original(parts: Sequence[EncoderPart]) -> Tensor:
    """A tensor of the encoder from its file, with zeros where dummy heads are added."""
    first = parts[0]
    with safe_open(_stored(first).file, framework="pt") as opened:
        whole = opened.get_tensor(first.read.name)
    if first.written.shape == first.read.shape:
        return whole
    out = whole.new_zeros(first.written.shape)
    for one in parts:
        out[one.written.extent] = whole[one.read.extent]
    return out
