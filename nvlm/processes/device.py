"""The only module that distinguishes CPU from CUDA.

Megatron-Core is written for CUDA: it asks torch.cuda for the current device, allocates on "cuda", and tells
optimizer parameters apart by type names such as "torch.cuda.FloatTensor". Without a GPU, `prepare()` makes the CPU
answer in its place, so that the same Megatron classes run on gloo. With a GPU it patches nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator

import torch
from torch.overrides import TorchFunctionMode

_CUDA_TYPES = {torch.float32: "FloatTensor", torch.bfloat16: "BFloat16Tensor", torch.float16: "HalfTensor"}


def has_cuda() -> bool:
    """True if a CUDA device is usable."""
    return torch.cuda.is_available()


def is_hopper_or_later() -> bool:
    """True if this process's GPU is of compute capability 9.0 or above."""
    return torch.cuda.get_device_capability() >= (9, 0)


def backend() -> str:
    """The torch.distributed backend of this machine."""
    return "nccl" if has_cuda() else "gloo"


def device() -> torch.device:
    """This process's device."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def gpu_name() -> str | None:
    """The driver's name for this process's GPU; None on CPU."""
    return torch.cuda.get_device_name() if has_cuda() else None


def to_device(x: torch.Tensor, place: torch.device) -> torch.Tensor:
    """`x`, computed on the CPU, on `place`. The host does not wait for what a GPU still has to do.

    CUDA copies page-locked memory while the host goes on, but may wait for the GPU before it copies other memory. torch
    keeps a pool of page-locked memory, so none is allocated once training runs.
    """
    return page_locked(x, place).to(place, non_blocking=True)


def page_locked(x: torch.Tensor, place: torch.device) -> torch.Tensor:
    """`x` in page-locked memory if it is on the CPU and `place` is a GPU."""
    return x.pin_memory() if place.type == "cuda" and x.is_cpu else x


def peak_memory() -> int:
    """The most bytes that this process has had at once so far: allocated by torch on its GPU, or on CPU resident."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


class Moment:
    """A point in time for measuring; on a GPU, when the queue reaches it, not when it was enqueued."""

    def __init__(self) -> None:
        if has_cuda():
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._time = time.perf_counter()

    def passed(self) -> bool:
        """Whether the GPU's queue has reached this moment."""
        return not has_cuda() or self._event.query()

    def since(self, earlier: Moment) -> float:
        """Seconds since `earlier`, of a moment that has passed."""
        if not has_cuda():
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1000


@contextlib.contextmanager
def named_range(name: str) -> Iterator[None]:
    """A block that torch's profiler and, with a GPU, Nsight show as `name`."""
    with torch.profiler.record_function(name), torch.cuda.nvtx.range(name) if has_cuda() else contextlib.nullcontext():
        yield


def prepare(local_rank: int = 0, threads: int | None = None) -> torch.device:
    """Make this process ready for Megatron-Core and return its device. Idempotent.

    `threads`: intra-op CPU threads, None for torch's default (all cores).
    """
    if has_cuda():
        torch.cuda.set_device(local_rank)
        return device()
    if threads is not None:
        torch.set_num_threads(threads)
    if not _CpuAnswersForCuda.active:
        _install()
    return device()


class _CpuAnswersForCuda(TorchFunctionMode):
    """Turns "cuda" into "cpu" in torch calls, and reports CPU tensors under the type names that Megatron expects."""

    active = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = _CUDA_TYPES.get(args[0].dtype)
            return f"torch.cuda.{name}" if name else func(*args)
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def untranslated() -> contextlib.AbstractContextManager:
    """A block whose torch calls name no device, such as a forward pass: they bypass the CPU's redirection, which would
    take a third of a small model's step."""
    return torch._C.DisableTorchFunction()


def graphed(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`function`, of one tensor and without gradients, as a CUDA graph. All calls must have the first call's shape.

    The first call captures it; later calls cost one launch. Without a GPU, returns `function` itself.
    """
    if not has_cuda():
        return function
    captured: list[tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = []

    def replay(x: torch.Tensor) -> torch.Tensor:
        if not captured:
            static = x.clone()
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):  # libraries choose their kernels in the first calls
                    function(static)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = function(static)
            captured.append((graph, static, out))
        graph, static, out = captured[0]
        static.copy_(x)
        graph.replay()
        return out.clone()

    return replay


def compiled(function: Callable) -> Callable:
    """`function`, which torch compiles where its first argument is on a GPU: one kernel in place of several.

    Not of dynamic shapes from the start: with a known width, a norm reads its input once.
    """

    @functools.cache
    def fast() -> Callable:
        # Beyond the limit (8 by default) torch silently runs uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        return torch.compile(function)

    @functools.wraps(function)
    def call(first: torch.Tensor, *rest):
        return (fast() if first.is_cuda else function)(first, *rest)

    return call


class _Nothing:
    """Stands in for CUDA streams and events: accepts every call and does nothing, since CPU work is synchronous."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def _install() -> None:
    # Imported only here, so that has_cuda() does not cost Megatron's five seconds of imports.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron's jitted fusions would compile for minutes on CPU.
    import megatron.core.tensor_parallel.random as megatron_random

    cuda, cpu = torch.cuda, torch.device("cpu")

    def nothing(*args, **kwargs):
        return None

    # A device, not an int, so that it works as `device=torch.cuda.current_device()` and in `.to(...)`.
    cuda.current_device = lambda: cpu
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed  # torch.manual_seed calls these
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"):
        setattr(cuda, name, nothing)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *args: 0)
    cuda.current_stream = cuda.default_stream = cuda.Stream = cuda.Event = _Nothing
    cuda.stream = lambda *args: contextlib.nullcontext()
    torch.nn.Module.cuda = lambda module, *args: module
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Megatron warns when the CPU generator changes inside a "GPU" generator's context, but here they are the same.
    logging.getLogger(megatron_random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())
    _use_torch_optimizers()
    _CpuAnswersForCuda().__enter__()
    _CpuAnswersForCuda.active = True


def _use_torch_optimizers() -> None:
    """Make Megatron's optimizers compute with torch, as without Transformer Engine and Apex. Megatron uses the CUDA
    kernels of these two whenever they are installed, without checking for a GPU."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed_precision

    optimizer.Adam = distrib_optimizer.Adam = torch.optim.AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    for module in (clip_grads, mixed_precision):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None
