"""Process groups and seeds: from the launcher's environment to Megatron's groups and back to nothing."""

from __future__ import annotations

import os
import socket
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from nvlm.config.compute import ParallelConfig
from nvlm.config.values import ConfigError, problem
from nvlm.processes import device
from nvlm.processes.workers import LISTENER

_LONG = 20.0  # seconds until a rendezvous says that it waits
_POLL = 0.5


@contextmanager
def distributed(parallel: ParallelConfig, seed: int, threads: int | None = None):
    """Process groups for `parallel` over the launcher's RANK and WORLD_SIZE (one process without them).

    Yields the device. Everything is torn down on exit, also when the body raises.
    """
    here = device.prepare(int(os.environ.get("LOCAL_RANK", 0)), threads)
    alone = {} if "MASTER_PORT" in os.environ else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(alone)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # The watchdog, which knows more, is to speak first.
    timeout = 4 * parallel.timeout_minutes
    dist.init_process_group(
        device.backend(),
        store=meet(rank, world, 60 * parallel.timeout_minutes),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=timeout),
    )
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
            context_parallel_size=parallel.context,
            hierarchical_context_parallel_sizes=list(parallel.context_mesh) if parallel.context > 1 else None,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout,
        )
        _seed(seed)
        yield here
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        for name in alone:  # what this process starts later must not take them for its own
            del os.environ[name]


def meet(rank: int, world: int, seconds: float) -> dist.Store:
    """A store that all of `world` processes have reached at MASTER_ADDR and MASTER_PORT, within `seconds`.

    Raises ConfigError with what is known of those that did not come.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place, limit = f"rendezvous at {host}:{port}", timedelta(seconds=seconds)
    server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun has one
    try:
        if not server:
            _reach(host, port, seconds)
        listening = {"master_listen_fd": int(os.environ.pop(LISTENER))} if server and LISTENER in os.environ else {}
        store = dist.TCPStore(host, port, world, server, limit, wait_for_workers=False, multi_tenant=True, **listening)
        os.environ["MASTER_PORT"] = str(store.port)  # chosen by the system where it was 0
        first = (store.add("nvlm/arrived", 1) - 1) // world * world  # runs of a sweep meet here one behind the other
        came = _await(store, first, world, seconds, None if rank else place)
    except (dist.DistError, OSError) as error:
        got = f"{str(error).splitlines()[0].rstrip('.')} (process {rank} of {world})"
        fix = "export MASTER_ADDR=<host of rank 0> and MASTER_PORT=<a port that is free there>, alike for all"
        refusal = problem(place, got, "a place where all processes meet", fix)
        if rank:  # rank 0, which speaks for all, may be well, and elsewhere
            print(f"error: {refusal}", file=sys.stderr, flush=True)
        raise refusal from None
    if came < world:
        fix = f"start all {world} alike, or unset RANK WORLD_SIZE for a run of one machine"
        raise problem(place, f"{came} of {world} processes within {seconds:.0f} s", "all of them", fix)
    return dist.PrefixStore(f"nvlm/{first}", store)


def _reach(host: str, port: int, seconds: float) -> None:
    """Wait until somebody listens at `host`:`port`: torch's own client fills the screen with its stack. OSError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _await(store: dist.Store, first: int, world: int, seconds: float, place: str | None) -> int:
    """How many of `world` have arrived behind the `first` ones: once all have, or rank 0's `seconds` are over.

    `place`: what rank 0 calls the rendezvous when it says for whom it waits; None on the others.
    """
    over, began = f"nvlm/{first}/over", time.monotonic()
    limit = seconds if place else 2 * seconds  # rank 0 gives up for all
    while True:
        came, waited = store.add("nvlm/arrived", 0) - first, time.monotonic() - began
        if came >= world or store.check([over]):
            return came
        if waited > limit:
            store.set(over, "")
            time.sleep(3 * _POLL)  # the store is here: the others read it
            return came
        if waited > _LONG and place:
            print(f"{place}: {came} of {world} processes are here, waiting for the others", file=sys.stderr, flush=True)
            place = None
        time.sleep(min(_POLL, 0.02 + waited / 10))


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@contextmanager
def seeded(seed: int, part: str):
    """Random numbers that depend on `seed` and `part` alone, so that a part of a model begins alike in any layout."""
    _seed(zlib.crc32(f"{seed} {part}".encode()))
    try:
        yield
    finally:
        _seed(seed)


def data_rank() -> tuple[int, int]:
    """This process's data-parallel rank and the data-parallel size."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def pipeline_rank() -> int:
    """The pipeline stage of this process, virtual ones not counted."""
    return parallel_state.get_pipeline_model_parallel_rank()


def is_first_rank() -> bool:
    """True on the one process that writes files and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_replica_writer() -> bool:
    """True on one process of each data-parallel replica: the one that tells what its loader saw."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    )


def is_loss_rank() -> bool:
    """True on one process of each part of the text stream: those on the last stage that tell their part of the loss."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_last_stage(
        ignore_virtual=True
    )


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all processes."""
    dist.all_reduce(values)
    return values


def rank() -> int:
    """This process's number in the whole run."""
    return dist.get_rank()


def world_size() -> int:
    """Processes of the whole run."""
    return dist.get_world_size()


def gather_over_data(rows: list) -> list:
    """The rows of all data-parallel replicas, on each of them."""
    parts: list[list] = [[] for _ in range(parallel_state.get_data_parallel_world_size())]
    dist.all_gather_object(parts, rows, group=parallel_state.get_data_parallel_group())
    return [row for part in parts for row in part]


def subgroups(own: list[int]) -> dist.ProcessGroup:
    """The process group of the ranks `own`; called by all processes at once, each with the group that it is in."""
    listed: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(listed, own)
    groups = sorted({tuple(ranks) for ranks in listed if ranks})
    made = {ranks: dist.new_group(ranks) for ranks in groups}
    return made.get(tuple(own))


def from_first_rank(value, group: dist.ProcessGroup | None = None):
    """The first process's `value`, on all of them (of `group`, where that holds all)."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def raised_together(check: Callable[[], None]) -> None:
    """Let the first process `check` something; a ConfigError that it raises is raised by all."""
    refusal = None
    if is_first_rank():
        try:
            check()
        except ConfigError as error:
            refusal = str(error)
    if told := from_first_rank(refusal):
        raise ConfigError(told)


def patient_group() -> dist.ProcessGroup:
    """All processes, of which one may wait for a person: other groups' timeouts are for what should not take long."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))
