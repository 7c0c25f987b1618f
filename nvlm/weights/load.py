"""Loads published weights into the model: each rank just its own slices, in any layout.

Tensors are memory-mapped: the kernel reads a file once for all ranks of a machine, and a rank keeps only its slices.
Ranks go through the files together, so this also holds if the files are larger than the machine's memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import safe_open
from torch import Tensor

from nvlm.config.values import problem
from nvlm.processes.groups import is_first_rank
from nvlm.weights.parts import Part
from nvlm.weights.published import Source


@torch.no_grad()
def read(source: Source, groups: Iterable[str], ours: Mapping[str, Tensor], rank: int = 0, size: int = 1) -> None:
    """Fill `ours`, this rank's tensors by their names in the whole model, from the module groups `groups` of `source`.

    `rank` of `size`: tensor-parallel rank. A collective call. Tensors missing from `ours` are on other pipeline stages.
    """
    by_tensor: dict[str, list[Part]] = defaultdict(list)
    for group in groups:
        for part in source.parts[group]:
            by_tensor[part.name].append(part)
    by_file: dict = defaultdict(list)
    for name, parts in by_tensor.items():
        by_file[source.stored[name].file].append((name, parts))
    total = sum(source.stored[name].bytes for name in by_tensor)
    with _bar(f"{', '.join(groups)} from {source.key}", total) as advance:
        for file in sorted(by_file):
            for name, parts in sorted(by_file[file], key=lambda entry: source.stored[entry[0]].place):
                own = [(part, ours[part.ours]) for part in parts if part.ours in ours]
                if own:
                    # Opened once per tensor, since a closed mapping no longer counts as this process's memory.
                    with safe_open(file, framework="pt") as opened:
                        _copy(opened.get_slice(name), own, rank, size, f"{source.key}: {name}")
                advance(source.stored[name].bytes)
            if dist.get_world_size() > 1:
                dist.barrier()


def _copy(stored, own: Sequence[tuple[Part, Tensor]], rank: int, size: int, what: str) -> None:
    for part, local in own:
        view = part.target(local, rank, size)
        if view.numel():  # the last ranks of a padded vocabulary may hold only padding
            view.copy_(stored[part.source(rank, size)].reshape(view.shape))
        part.padding(local, rank, size).zero_()
    if own[0][0].region:
        _check_dummies(stored, [part for part, _ in own], what)


def _check_dummies(stored, parts: Sequence[Part], what: str) -> None:
    """Raise ConfigError unless the tensor is zero outside `parts`, where its dummy heads are."""
    covered = sum(torch.Size(e.stop - e.start for e in part.extent).numel() for part in parts)
    if covered == torch.Size(parts[0].shape).numel():
        return
    whole = stored[:]
    if whole.count_nonzero() != sum(whole[part.extent].count_nonzero() for part in parts):
        raise problem(what, "dummy heads that are not zero", "zeros", "use the release's own files")


@contextmanager
def _bar(title: str, total: int):
    """A progress bar on the first rank; yields a function that advances it by a number of bytes."""
    if not is_first_rank():
        yield lambda count: None
        return
    columns = (BarColumn(20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), TextColumn(title))
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
