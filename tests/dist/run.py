"""Runs several processes on this machine, joined by gloo, for tests: `run_distributed(fn, world, *args)`.

Processes are forked from a server that has imported torch and Megatron once (tests/server.py). None is left behind.
"""

from __future__ import annotations

import gc
import os
import pickle
import queue
import random
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait

from megatron.core.dist_checkpointing.strategies import filesystem_async

from nvlm.commands.launch import quiet
from nvlm.config.values import Config
from nvlm.processes.groups import distributed
from nvlm.processes.workers import die_with_parent
from tests.server import CONTEXT

_PORTS = 64  # process groups that one call of `run_distributed` may build one after another


def run_distributed(fn: Callable, world: int, *args, timeout: float = 300) -> list:
    """Run `fn(*args)` in `world` processes with RANK and WORLD_SIZE set; returns their results by rank. Raises
    AssertionError with the traceback of the first rank that failed, or with the ranks that did not end in time."""
    ports = _free_ports()
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world)]
    processes = [
        CONTEXT.Process(target=_run, args=(fn, args, rank, world, ports, pipe[1])) for rank, pipe in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        for _, sending in pipes:
            sending.close()
        return _collect([receiving for receiving, _ in pipes], time.monotonic() + timeout)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()  # at once: it may not lead a group yet
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it started
                process.join()


def _free_ports() -> list[int]:
    # Below the ports that the system hands out by itself, which another process may be given at any moment.
    while True:
        first = random.randrange(10_000, 30_000 - _PORTS)
        try:
            for port in range(first, first + _PORTS):
                with socket.socket() as s:
                    s.bind(("", port))
        except OSError:
            continue
        return list(range(first, first + _PORTS))


def _collect(pipes: list[Connection], deadline: float) -> list:
    results: dict[int, object] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        missing = [rank for rank in range(len(pipes)) if rank not in results]
        assert ready, f"ranks {missing} did not end in time"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                worked, result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert worked, f"rank {rank} failed:\n{result}"
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _run(fn: Callable, args: tuple, rank: int, world: int, ports: list[int], pipe: Connection) -> None:
    global _ports
    os.setsid()
    die_with_parent(os.getppid())  # the server, which ends with the tests, however they do
    _ports = iter(ports)
    quiet()
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    try:
        pipe.send_bytes(pickle.dumps((True, fn(*args))))  # by value: a tensor's storage ends with its process
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))


def save_without_a_server() -> None:
    """Megatron's blocking save would start a server process that imports everything again."""
    filesystem_async._results_queue = queue.Queue()


_ports: Iterator[int] = iter(())


@contextmanager
def joined(config: Config):
    """Process groups for `config`, inside a function that `run_distributed` runs; may be entered repeatedly."""
    # A port of its own each time: the store of the groups before may still be closing.
    os.environ["MASTER_PORT"] = str(next(_ports))
    with distributed(config.parallel, config.seed, threads=1) as device:
        save_without_a_server()
        yield device
    gc.collect()  # the groups' threads end with the last reference to them
