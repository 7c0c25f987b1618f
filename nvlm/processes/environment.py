"""Environment variables that CUDA and torch's libraries read once, when they start. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from nvlm.config.compute import ParallelConfig

_ALLOCATOR = "PYTORCH_ALLOC_CONF"
_OLDER_NAMES = {_ALLOCATOR: "PYTORCH_CUDA_ALLOC_CONF"}  # torch still reads it, and prefers it to the new one
_MARGIN = "20"  # of an H100's 132 multiprocessors
# Compiled products that oneDNN keeps on a CPU, by shape, in a cache of its own and one of torch's; both keep 1024 by
# default. Rows have new lengths in each step, so hits are rare, and the host's memory grows for hundreds of steps.
_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}


def set_defaults(environment: MutableMapping[str, str], parallel: ParallelConfig, processes: int) -> None:
    """Add what a process of a run of `processes` needs to `environment`, before it imports torch. Variables that are
    already there keep their values."""
    for name, value in defaults(parallel, processes).items():
        if _OLDER_NAMES.get(name, name) not in environment:
            environment.setdefault(name, value)


def defaults(parallel: ParallelConfig, processes: int) -> Mapping[str, str]:
    """The variables by name."""
    found = {
        _ALLOCATOR: "expandable_segments:True",  # row lengths vary, which would fragment the memory
        **_PRODUCTS,
    }
    if processes > 1:
        found |= {
            "NCCL_DEBUG": "WARN",  # says which network failed, and nothing else
            "TORCH_NCCL_HIGH_PRIORITY": "1",  # collectives get free multiprocessors before products do
            # Norms that need the whole GPU at once would wait for a collective that runs beside them.
            "NVTE_FWD_LAYERNORM_SM_MARGIN": _MARGIN,
            "NVTE_BWD_LAYERNORM_SM_MARGIN": _MARGIN,
        }
    if parallel.tensor > 1 or parallel.context > 1:
        # With one queue, kernels start in the order of their launches: a collective before the product that is to hide
        # it. With several queues, the product may take all multiprocessors first.
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return found
