"""Writes a checkpoint's files with Megatron's strategy, but finishes the save itself.

Megatron's own finish leaves the other ranks waiting forever if rank 0 cannot write the metadata, drops the reason of a
failed write, and passes results through a server process that outlives a killed run.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from nvlm.runs.digests import Digest, digest


class Writer:
    """Writes states of the same structure, one at a time, reusing the plan of the first."""

    def __init__(self) -> None:
        self._plain = self._strategy = _Strategy(cached_metadata=True)
        if dist.get_world_size() > 1:  # tensors that several ranks hold are divided among them, each written once
            self._strategy = FullyParallelSaveStrategyWrapper(self._plain, dist.group.WORLD, True)
        filesystem_async._results_queue = ()  # anything but None: no server process

    def request(self, state: dict, folder: Path, finish: Callable[[], None]) -> AsyncRequest:
        """A request to write `state` into `folder` and call `finish` once all ranks have. A collective call."""
        apply_factories(state)
        dict_list_map_inplace(_without_copy, state)
        request = dist_checkpointing.save(
            state,
            str(folder),
            self._strategy,
            validate_access_integrity=False,  # the strategy checks its first plan
            async_sharded_save=True,
            async_strategy="mcore",
        )
        return request._replace(finalize_fns=[finish])

    def written(self) -> tuple[list, dict[str, Digest]] | str:
        """This rank's write results and its files' digests, or the reason why it could not write them."""
        with self._plain.report as report:
            report.seek(0)
            try:
                return pickle.load(report) if self._plain.storage.write_buckets else ([], {})
            except (EOFError, pickle.UnpicklingError):
                return "the writing process ended early"

    def write_metadata(self, folder: Path, written: list[list]) -> None:
        """Write the metadata for readers, from each rank's write results; on rank 0. Raises OSError."""
        self._plain.storage.finish(self._plain.metadata, written)
        save_config(CheckpointingConfig(self._plain.backend, self._plain.version), str(folder))


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron's strategy as far as the plan."""

    def _get_save_and_finalize_callbacks(self, storage, planned, async_strategy) -> AsyncRequest:
        self.storage, self.metadata, _ = planned
        self.report = os.fdopen(os.memfd_create("written"), "w+b")  # in memory: a full disk must not silence it
        write, preload, arguments = storage.get_save_function_and_args()
        if write is not None:
            write = functools.partial(_write_files, self.report, write.args[0])
        return AsyncRequest(write, arguments, [], preload_fn=preload)


def _write_files(report, transforms: list, rank: int, buckets: list, _) -> None:
    """Write this rank's files and their results to `report`; in a forked process, unless the loop waits."""
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
    except Exception as error:  # any error at all: the other ranks wait for the report
        pickle.dump(_reason(error), report)
    report.flush()


def _reason(error: BaseException) -> str:
    """The operating system's message, if any; torch wraps it in an error about file positions."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    return str(next((link for link in chain if isinstance(link, OSError)), error))


def _without_copy(entry):
    """Replace a CPU view by a tensor with its own storage over the same memory; Megatron would copy a view."""
    if isinstance(entry, ShardedTensor) and entry.data.device.type == "cpu" and entry.data.is_contiguous():
        data = entry.data.detach()
        if data.untyped_storage().nbytes() != data.nbytes:
            memory = torch.from_numpy(data.view(-1).view(torch.uint8).numpy())
            entry.data = memory.view(data.dtype).view(data.shape)
    return entry
