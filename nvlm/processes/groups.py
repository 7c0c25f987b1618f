"""Process groups and seeds: rendezvous, Megatron's groups, their teardown, and reductions over ranks."""

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

_LONG = 20.0  # seconds before a rendezvous reports that it is waiting
_POLL = 0.5


@contextmanager
def distributed(parallel: ParallelConfig, seed: int, threads: int | None = None):
    """Process groups for `parallel` over the launcher's RANK and WORLD_SIZE (one process without them).

    Yields the device. Everything is torn down on exit, even if the body raises.
    """
    here = device.prepare(int(os.environ.get("LOCAL_RANK", 0)), threads)
    alone = {} if "MASTER_PORT" in os.environ else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(alone)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # Longer than the watchdog's, which explains a hang better.
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
        for name in alone:  # processes started later must not inherit them
            del os.environ[name]


def meet(rank: int, world: int, seconds: float) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT, once all `world` processes have reached it.

    Raises ConfigError if they do not within `seconds`, with what is known about the missing ones.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place, limit = f"rendezvous at {host}:{port}", timedelta(seconds=seconds)
    server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun's agent serves
    try:
        if not server:
            _reach(host, port, seconds)
        listening = {"master_listen_fd": int(os.environ.pop(LISTENER))} if server and LISTENER in os.environ else {}
        store = dist.TCPStore(host, port, world, server, limit, wait_for_workers=False, multi_tenant=True, **listening)
        os.environ["MASTER_PORT"] = str(store.port)  # chosen by the system if it was 0
        first = (store.add("nvlm/arrived", 1) - 1) // world * world  # the runs of a sweep meet here one after another
        came = _await(store, first, world, seconds, None if rank else place)
    except (dist.DistError, OSError) as error:
        got = f"{str(error).splitlines()[0].rstrip('.')} (process {rank} of {world})"
        fix = "export the same MASTER_ADDR=<host of rank 0> and MASTER_PORT=<a free port there> for all processes"
        refusal = problem(place, got, "an address that all processes can reach", fix)
        if rank:  # rank 0 reports for all, but it may be fine and waiting elsewhere
            print(f"error: {refusal}", file=sys.stderr, flush=True)
        raise refusal from None
    if came < world:
        fix = f"start all {world} in the same way, or unset RANK WORLD_SIZE for a run on one machine"
        raise problem(place, f"{came} of {world} processes within {seconds:.0f} s", "all of them", fix)
    return dist.PrefixStore(f"nvlm/{first}", store)


def _reach(host: str, port: int, seconds: float) -> None:
    """Wait until someone listens at `host`:`port`. Raises OSError; torch's own client would print a long stack."""
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
    """Wait until all `world` processes have arrived or rank 0's `seconds` are over; returns how many have.

    `first`: arrivals of earlier runs. `place`: the name of the rendezvous for rank 0's message; None on other ranks.
    """
    over, began = f"nvlm/{first}/over", time.monotonic()
    limit = seconds if place else 2 * seconds  # rank 0 gives up on behalf of all
    while True:
        came, waited = store.add("nvlm/arrived", 0) - first, time.monotonic() - began
        if came >= world or store.check([over]):
            return came
        if waited > limit:
            store.set(over, "")
            time.sleep(3 * _POLL)  # this process holds the store: let the others read it
            return came
        if waited > _LONG and place:
            print(f"{place}: {came} of {world} processes arrived, waiting for the others", file=sys.stderr, flush=True)
            place = None
        time.sleep(min(_POLL, 0.02 + waited / 10))


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@contextmanager
def seeded(seed: int, part: str):
    """Random numbers that depend only on `seed` and `part`, so that a part of a model starts equal in every layout."""
    _seed(zlib.crc32(f"{seed} {part}".encode()))
    try:
        yield
    finally:
        _seed(seed)


def data_rank() -> tuple[int, int]:
    """This process's data-parallel rank and the data-parallel size."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def seat() -> tuple[int, int]:
    """This process's rank within its replica, in the order of global ranks, and the number of ranks of a replica."""
    rank, size = 0, 1
    for own, count in (
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_world_size()),
        (parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()),
        (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()),
    ):
        rank, size = rank * count + own, size * count
    return rank, size


def pipeline_rank() -> int:
    """This process's pipeline stage, not counting virtual ones."""
    return parallel_state.get_pipeline_model_parallel_rank()


def is_first_rank() -> bool:
    """True on the one rank that writes files and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_replica_writer() -> bool:
    """True on one rank of each data-parallel replica: the one that reports what its loader saw."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    )


def is_loss_rank() -> bool:
    """True on one rank of the last stage for each part of the text stream: these report the loss."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_last_stage(
        ignore_virtual=True
    )


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all ranks, in place."""
    dist.all_reduce(values)
    return values


def rank() -> int:
    """This process's global rank."""
    return dist.get_rank()


def world_size() -> int:
    """Number of ranks in the run."""
    return dist.get_world_size()


def gather_over_data(rows: list) -> list:
    """The rows of all data-parallel replicas, on each of them."""
    parts: list[list] = [[] for _ in range(parallel_state.get_data_parallel_world_size())]
    dist.all_gather_object(parts, rows, group=parallel_state.get_data_parallel_group())
    return [row for part in parts for row in part]


def gather_over_ranks(rows: list) -> list:
    """The rows of all ranks, on each of them."""
    parts: list[list] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def any_rank(value: bool, group: dist.ProcessGroup, where: torch.device) -> bool:
    """Whether `value` is true on any rank of `group`."""
    found = torch.tensor(int(value), device=where)
    dist.all_reduce(found, group=group)
    return bool(found)


def subgroups(own: list[int]) -> dist.ProcessGroup:
    """The process group of the ranks `own`. A collective call: each rank passes the group that it belongs to."""
    listed: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(listed, own)
    groups = sorted({tuple(ranks) for ranks in listed if ranks})
    made = {ranks: dist.new_group(ranks) for ranks in groups}
    return made.get(tuple(own))


def from_first_rank(value, group: dist.ProcessGroup | None = None):
    """The first rank's `value`, on all ranks. `group`: another group of all ranks to send it over."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def raised_together(check: Callable[[], None]) -> None:
    """Run `check` on the first rank; all ranks raise its ConfigError, if any."""
    refusal = None
    if is_first_rank():
        try:
            check()
        except ConfigError as error:
            refusal = str(error)
    if reason := from_first_rank(refusal):
        raise ConfigError(reason)


def patient_group() -> dist.ProcessGroup:
    """A group of all ranks with a long timeout, for when one rank waits for a person to type."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))
