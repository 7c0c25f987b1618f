"""Where a step's time goes, by kernel: a few dozen lines instead of a trace of hundreds of megabytes."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_parts.timing import wait

LONGEST = 30  # kernels that are named
# What a kernel does, by its name: the first that matches. Names of attention kernels may contain "gemm" as well.
KINDS = (
    ("attention", r"attention|flash|fmha|flex|sdpa|fprop|bprop|dgrad_sm|softmax"),
    ("communication", r"nccl"),
    ("products", r"gemm|nvjet|xmma|cutlass|cublas|splitk|::(mm|bmm|addmm)$"),
    ("copies", r"memcpy|memset|copy_"),
)


def kind_of(kernel: str) -> str:
    """attention, communication, products or copies; all others are elementwise: norms, activations, casts, sums."""
    return next((kind for kind, names in KINDS if re.search(names, kernel, re.IGNORECASE)), "elementwise")


def by_kernel(step: Callable[[], object]) -> dict:
    """Milliseconds of one call of `step` by kind, and (name, ms, calls) of the kernels that take longest.

    `busy ms`: the sum over all kernels. What `wall ms` has beyond it, the GPU waited for the host (the profiler's own
    cost included). On a CPU: torch's operators instead of kernels.
    """
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as told:
        began = time.perf_counter()
        step()
        wait()
        wall = time.perf_counter() - began
    rows = [_row(event, cuda) for event in told.key_averages() if not getattr(event, "is_user_annotation", False)]
    kinds: Counter = Counter()
    for name, ms, _ in rows:
        kinds[kind_of(name)] += ms
    longest = sorted(rows, key=lambda row: -row[1])[:LONGEST]
    return {
        "wall ms": 1e3 * wall,
        "busy ms": sum(kinds.values()),
        "by kind": {kind: round(ms, 2) for kind, ms in kinds.most_common()},
        "kernels": [(name[:90], round(ms, 2), calls) for name, ms, calls in longest],
    }


def _row(event, cuda: bool) -> tuple[str, float, int]:
    return event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3, event.count
