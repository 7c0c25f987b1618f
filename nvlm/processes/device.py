"""The one place that knows CPU from CUDA.

Megatron-Core is written for CUDA: it asks torch.cuda for the current device, allocates on "cuda", and tells
optimizer parameters apart by the type name "torch.cuda.FloatTensor". Where there is no GPU, `prepare()` lets the
CPU answer those questions, so that the very same Megatron classes run on gloo. With a GPU it changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator

import torch
from torch.overrides import TorchFunctionMode

_CUDA_TYPES = {torch.float32: "FloatTensor", torch.bfloat16: "BFloat16Tensor", torch.float16: "HalfTensor"}


def has_cuda() -> bool:
    """True when a CUDA device is usable."""
    return torch.cuda.is_available()


def backend() -> str:
    """The torch.distributed backend of this machine."""
    return "nccl" if has_cuda() else "gloo"


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def gpu_name() -> str | None:
    """What the driver calls this process's GPU; None on CPU."""
    return torch.cuda.get_device_name() if has_cuda() else None


class Moment:
    """A point in this process's work: on a GPU where its queue comes to it, not where it was put in."""

    def __init__(self) -> None:
        if has_cuda():
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._time = time.perf_counter()

    def since(self, earlier: Moment) -> float:
        """Seconds. Waits until this moment has come."""
        if not has_cuda():
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


@contextlib.contextmanager
def named_range(name: str) -> Iterator[None]:
    """A block that torch's profiler, and with a GPU Nsight, show under `name`."""
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
    """Turns "cuda" into "cpu" in torch calls, and reports CPU tensors by the type names Megatron compares with."""

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
    """A block whose torch calls name no device, as a forward's: they are not looked at, which on CPU takes a third of
    the time of a small model's step."""
    return torch._C.DisableTorchFunction()


def graphed(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`function` of one tensor, without gradients, as a CUDA graph: for calls that all have the first one's shape.

    It is captured at the first call and then costs one launch. Without a GPU it is `function` itself.
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
                for _ in range(3):  # libraries choose their kernels at the first calls
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


class _Nothing:
    """Stands in for CUDA streams and events: accepts every call, orders nothing, since CPU work is synchronous."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def _install() -> None:
    # Imported only now: has_cuda() must be answerable without Megatron's five seconds of imports.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron's jitted fusions would compile for minutes on CPU.
    import megatron.core.tensor_parallel.random as megatron_random

    cuda, cpu = torch.cuda, torch.device("cpu")

    def nothing(*args, **kwargs):
        return None

    # A device, not an int: it is right in `device=torch.cuda.current_device()` and in `.to(...)` alike.
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
    # Megatron warns when the CPU generator moves inside a "GPU" generator's context: here they are one and the same.
    logging.getLogger(megatron_random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())
    _use_torch_optimizers()
    _CpuAnswersForCuda().__enter__()
    _CpuAnswersForCuda.active = True


def _use_torch_optimizers() -> None:
    """Let Megatron's optimizers compute with torch, as they do where neither Transformer Engine nor Apex is installed:
    those two bring CUDA kernels, and whether there is a GPU Megatron does not ask."""
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
