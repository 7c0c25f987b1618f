"""Counts the kernels that torch's operations launch on a GPU, and the bytes that they move; see launches.py.

A function that is compiled on a GPU is one kernel, which reads its inputs and writes its results once. So is a norm.
Views, allocations and operations on nothing are no kernels.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "addmv", "mv", "dot", "linear")
PASSES = ("compiled", "other")
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "lift_fresh")


@dataclass(slots=True)
class Count:
    """Launches by kind ("products", "attention", "compiled", "other"), and the bytes of the last two."""

    launches: Counter = field(default_factory=Counter)
    bytes: int = 0
    names: Counter = field(default_factory=Counter)

    def add(self, kind: str, name: str, tensors: list[Tensor]) -> None:
        """One kernel that reads or writes `tensors`."""
        self.launches[kind] += 1
        if kind in PASSES:
            self.names[name] += 1
            self.bytes += sum(bytes_of(tensor) for tensor in tensors)

    def minus(self, other: Count) -> Count:
        """What this count has more than `other`."""
        launches = Counter({kind: n - other.launches[kind] for kind, n in self.launches.items()})
        names = Counter({name: n - other.names[name] for name, n in self.names.items()})
        return Count(launches, self.bytes - other.bytes, names)


def bytes_of(tensor: Tensor) -> int:
    """Of memory that a kernel touches: an expanded dimension is read once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements * tensor.element_size()


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(*trees: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


class Counting(TorchDispatchMode):
    """Counts torch's operations as a GPU would launch them."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.paused = Count(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.paused:
            self._add(func, args, kwargs, out)
        return out

    def _add(self, func, args: tuple, kwargs: dict, out: object) -> None:
        name, given, results = func.overloadpacket.__name__, tensors_in(args, kwargs), tensors_in(out)
        changed = func._schema.is_mutable
        places = {_place(tensor) for tensor in given}
        if name in FREE or not results or not any(tensor.numel() for tensor in results):
            return
        if not changed and all(_place(tensor) in places for tensor in results):
            return  # a view
        if changed and name in ("copy_", "fill_", "zero_"):
            given = given[1:]  # the first is only written
        if name.endswith("_like"):
            given = []
        kind = "products" if name in PRODUCTS else "attention" if "scaled_dot_product" in name else "other"
        self.count.add(kind, name, [*given, *results])

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing inside is counted."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


def once(function: Callable, kind: str = "other", copies: bool = False) -> Callable:
    """`function`, which a `Counting` counts as one kernel, and its backward pass as another.

    `copies`: the kernel takes only contiguous tensors, so others are copied before.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        mode = _get_current_dispatch_mode()
        if not isinstance(mode, Counting) or mode.paused:
            return function(*args, **kwargs)
        if copies:
            args = [x.contiguous() if isinstance(x, Tensor) else x for x in args]
        leaves, spec = tree_flatten((args, kwargs))
        return _Once.apply((function, kind, spec), *leaves)

    return call


class _Once(torch.autograd.Function):
    """A function whose forward and backward passes are a kernel each."""

    @staticmethod
    def forward(ctx, what: tuple, *leaves):
        mode, (function, kind, spec) = _get_current_dispatch_mode(), what
        learns, kept = any(isinstance(x, Tensor) and x.requires_grad for x in leaves), []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
        inner = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
        with mode.pause(), torch.set_grad_enabled(learns), hooks:
            args, kwargs = tree_unflatten(inner, spec)
            out = function(*args, **kwargs)
        mode.count.add(kind, function.__name__, tensors_in(inner, out))
        ctx.rest = kind, function.__name__, inner, out, bool(kept)
        return tree_map_only(Tensor, Tensor.detach, out)

    @staticmethod
    def backward(ctx, *gradients):
        mode, (kind, name, inner, out, kept) = _get_current_dispatch_mode(), ctx.rest
        wanted = [x for x in inner if isinstance(x, Tensor) and x.requires_grad]
        results = [x for x in tensors_in(out) if x.requires_grad]
        given = [g for x, g in zip(tensors_in(out), gradients, strict=True) if x.requires_grad]
        with mode.pause():
            found = list(torch.autograd.grad(results, wanted, given, allow_unused=True))
        made = [x for x in tensors_in(found) if _place(x) not in {_place(g) for g in given}]
        if made:  # the gradient of an addition is the one that came
            mode.count.add(kind, f"{name} backward", [*given, *made, *(tensors_in(inner) if kept else [])])
        found.reverse()
        return None, *(found.pop() if isinstance(x, Tensor) and x.requires_grad else None for x in inner)


def _flash(query_BNSD: Tensor, *rest, **options) -> Tensor:
    """Attention whose output lies in memory as that of flash attention and cuDNN: [B, S, N, D]."""
    out_BNSD = nn.functional.scaled_dot_product_attention(query_BNSD, *rest, **options)
    return out_BNSD.transpose(1, 2).contiguous().transpose(1, 2)


@contextlib.contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Inside, functions that are one kernel on a GPU are counted as one: torch's own, and those that are compiled."""
    from megatron.core.fusions import fused_bias_dropout, fused_bias_swiglu
    from torch.nn import functional

    from nvlm.attention import kernel
    from nvlm.attention.kernels import dense, flex
    from nvlm.vision.encoders import inference

    kernels = [
        (functional, "rms_norm", "other", True),
        (functional, "layer_norm", "other", True),
        (flex, "attend_blocks", "attention", False),
        (fused_bias_dropout, "bias_dropout_add_fused_train", "compiled", False),
        (fused_bias_dropout, "bias_dropout_add_fused_inference", "compiled", False),
        (fused_bias_swiglu, "swiglu", "compiled", False),
        (fused_bias_swiglu, "swiglu_back", "compiled", False),
        (inference, "add_rms_norm", "compiled", False),
        (inference, "add_layer_norm", "compiled", False),
        (inference, "norm_both", "compiled", False),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, kind, copies in kernels:
            stack.enter_context(mock.patch.object(module, name, once(getattr(module, name), kind, copies)))
        stack.enter_context(mock.patch.object(dense, "scaled_dot_product_attention", once(_flash, "attention")))
        stack.enter_context(mock.patch.object(kernel, "for_kernel", lambda x: x))  # a CPU attends in fp32
        yield
