"""Several processes on this machine, joined by gloo, for tests: `run_distributed(fn, world, *args)`."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from contextlib import contextmanager

from nvlm.parallel import distributed, free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["nvlm.train.loop"])


def run_distributed(fn, world: int, *args, timeout: float = 200) -> list:
    """What `fn(*args)` returned in each of `world` processes."""
    ports = [free_port() for _ in range(32)]
    pipes = [_context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        _context.Process(target=_run, args=(fn, args, rank, world, ports, pipe[1])) for rank, pipe in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        for _, sending in pipes:
            sending.close()
        answers = []
        for receiving, _ in pipes:
            assert receiving.poll(timeout), "no answer"
            worked, answer = receiving.recv()
            assert worked, answer
            answers.append(answer)
        return answers
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(fn, args, rank: int, world: int, ports: list[int], pipe) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    _ports.extend(ports)
    try:
        pipe.send((True, fn(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


_ports: list[int] = []


@contextmanager
def joined(config):
    """Process groups for `config`, inside a function that `run_distributed` runs; may be entered many times."""
    os.environ["MASTER_PORT"] = str(_ports.pop())
    with distributed(config.parallel, config.seed, threads=1) as device:
        yield device
