"""How the files of a checkpoint are written: Megatron's strategy, with an end of its own.

Megatron's own end lets the other ranks wait for ever where rank 0 cannot write the metadata, drops the reason of a
failed write, and starts a server process to carry results, which outlives a killed run.
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
    """Writes states of one structure, one at a time: the plan of the first serves the others."""

    def __init__(self) -> None:
        self._plain = self._strategy = _Strategy(cached_metadata=True)
        if dist.get_world_size() > 1:  # what several ranks hold is spread over them, each tensor written once
            self._strategy = FullyParallelSaveStrategyWrapper(self._plain, dist.group.WORLD, True)
        filesystem_async._results_queue = ()  # anything but None: no server process

    def request(self, state: dict, folder: Path, finish: Callable[[], None]) -> AsyncRequest:
        """The request to write `state` into `folder` and to call `finish` once all ranks have; all ranks make it."""
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
        """What this rank's files hold and their digests, or why it could not write them."""
        with self._plain.report as report:
            report.seek(0)
            try:
                return pickle.load(report) if self._plain.storage.write_buckets else ([], {})
            except (EOFError, pickle.UnpicklingError):
                return "the writing process ended early"

    def write_metadata(self, folder: Path, written: list[list]) -> None:
        """What a reader needs beside the data, from what each rank wrote; on rank 0. Raises OSError."""
        self._plain.storage.finish(self._plain.metadata, written)
        save_config(CheckpointingConfig(self._plain.backend, self._plain.version), str(folder))


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron's up to the plan."""

    def _get_save_and_finalize_callbacks(self, storage, planned, async_strategy) -> AsyncRequest:
        self.storage, self.metadata, _ = planned
        self.report = os.fdopen(os.memfd_create("written"), "w+b")  # in memory: a full disk must not silence it
        write, preload, arguments = storage.get_save_function_and_args()
        if write is not None:
            write = functools.partial(_write_files, self.report, write.args[0])
        return AsyncRequest(write, arguments, [], preload_fn=preload)


def _write_files(report, transforms: list, rank: int, buckets: list, _) -> None:
    """Write this rank's files and `report` what they hold: in a forked process, unless the loop waits."""
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
        pickle.dump(_reason(error), report)
    report.flush()


def _reason(error: BaseException) -> str:
    """The system's own words; torch puts an error about positions in a file in front of them."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    return str(next((link for link in chain if isinstance(link, OSError)), error))


def _without_copy(entry):
    """A CPU view as a tensor of its own over the same memory: Megatron copies views while the loop stands still."""
    if isinstance(entry, ShardedTensor) and entry.data.device.type == "cpu" and entry.data.is_contiguous():
        data = entry.data.detach()
        if data.untyped_storage().nbytes() != data.nbytes:
            memory = torch.from_numpy(data.view(-1).view(torch.uint8).numpy())
            entry.data = memory.view(data.dtype).view(data.shape)
    return entry
