"""The machine that the GPU benchmarks run on, and their clock."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nvlm.commands.compose import compose_config
from nvlm.commands.launch import quiet
from nvlm.processes.environment import set_defaults


def prepare() -> None:
    """The environment that a training run on one GPU gives itself, and no library's warnings. Before CUDA starts."""
    set_defaults(os.environ, compose_config("parallel=one").parallel, processes=1)
    quiet()


def machine() -> dict[str, str]:
    """The device, torch's version, and the commit: NVLM_COMMIT where the tree has no history."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    commit = os.environ.get("NVLM_COMMIT") or _output(git) or "unknown"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"device": name, "torch": torch.__version__, "commit": commit}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def timed(function: Callable[[], object], repeats: int, warm_up: int = 2) -> float:
    """Median seconds of a call, after calls that compile, choose kernels and let the allocator grow."""
    seconds = []
    for number in range(repeats + warm_up):
        wait()
        began = time.perf_counter()
        function()
        wait()
        if number >= warm_up:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def wait() -> None:
    """Until the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget() -> None:
    """Free the memory of deleted objects."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
