"""Packed self- and cross-attention with the kernels of training, against dense masks in fp32: errors and times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu_parts.sizes import ARCHITECTURES, Size, a_mixed_row
from benchmarks.gpu_parts.steps import one_batch
from benchmarks.gpu_parts.timing import timed
from nvlm.arch import registry
from nvlm.arch.pipeline import build_parts
from nvlm.attention.kernel import View
from nvlm.attention.kernels.dense import DENSE
from nvlm.attention.kernels.flex import Flex
from nvlm.commands.compose import compose_config
from nvlm.config.values import Config
from nvlm.data.batch import PAD, Batch
from nvlm.llm.backend import uses_te
from nvlm.processes import groups

LONGEST = 4096  # tokens a row: at 8192, NVLM-X's dense fp32 scores are 21 GB a matrix
CLOSE = 0.02  # error in bf16, relative to the largest value

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """An attention to compare. `padding_S`: True at queries whose output does not matter."""

    name: str
    dense: View
    packed: Attend
    queries: int
    keys: int
    padding_S: Tensor | None = None


def attention(size: Size) -> Iterator[dict]:
    """A row for each kernel that training uses on each architecture's rows of several samples."""
    size = replace(size, row=min(size.row, LONGEST))
    for arch in ARCHITECTURES:
        config = compose_config(*size.overrides, f"arch={arch}", "precision=bf16")
        with groups.distributed(config.parallel, config.seed) as device:
            samples = a_mixed_row(config, size)
            for case in cases(config, one_batch(config, samples).to(device)):
                yield {"attention": case.name, "samples": len(samples)} | compared(config, case, size.repeats)


def cases(config: Config, batch: Batch) -> Iterator[Case]:
    """Self-attention for an architecture without keys, else cross-attention."""
    columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    if registry.tile_use(config, 0).keys:
        dense, blocks = (kernel.keys(batch, columns) for kernel in (DENSE, Flex()))
        name = f"cross, {config.arch.name}, blocks"
        yield Case(name, dense, blocks.attend, len(columns), batch.cross_tokens.shape[1])
        return
    dense, blocks = (kernel.columns(batch) for kernel in (DENSE, Flex()))
    yield Case("self, blocks", dense, blocks.attend, len(columns), len(columns))
    if uses_te(config):
        packed, padding_S = _of_engine(config, batch), batch.sample[0] == PAD
        yield Case("self, Transformer Engine", dense, packed, len(columns), len(columns), padding_S)


def _of_engine(config: Config, batch: Batch) -> Attend:
    """Transformer Engine's attention of a batch of one row, as a decoder layer has it."""
    (model,) = build_parts(replace(config, llm=replace(config.llm, layers=1), arch=replace(config.arch, cross_every=0)))
    core, view = model.decoder.layers[0].self_attention.core_attention, model.attends().columns.columns(batch)
    return lambda q, k, v: core(q, k, v, view)


def compared(config: Config, case: Case, repeats: int) -> dict:
    """Errors of bf16 relative to the largest value of fp32 attention, and both times.

    FlexAttention has no backward pass on a CPU, so only outputs are compared there.
    """
    inputs = _noise(config, case)
    exact = _run(case, case.dense.attend, [x.float() for x in inputs])
    got = _run(case, case.packed, inputs)
    errors = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True)]
    blind = case.dense.mask.all(-1)[0, 0]
    zero = not blind.any() or not got[0][blind].any()
    ms, dense_ms = (1e3 * timed(lambda f=f: _run(case, f, inputs), repeats) for f in (case.packed, case.dense.attend))
    return {
        "queries": case.queries, "keys": case.keys, "seen": float((~case.dense.mask).float().mean()),
        "output error": errors[0], "gradient error": max(errors[1:], default=None), "blind get zero": bool(zero),
        "ms": ms, "dense ms": dense_ms, "right": bool(zero) and max(errors) < CLOSE,
    }  # fmt: skip


def _noise(config: Config, case: Case) -> list[Tensor]:
    """Queries, keys and values [n, 1, heads, width]."""
    llm, device = config.llm, case.dense.mask.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(3)
    shapes = (case.queries, llm.heads), (case.keys, llm.kv_heads), (case.keys, llm.kv_heads)
    return [torch.randn(n, 1, heads, llm.head_dim, generator=generator, device=device).to(dtype) for n, heads in shapes]


def _run(case: Case, function: Attend, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output and, on a GPU, the gradients of the inputs."""
    learns = inputs[0].is_cuda
    leaves = [x.detach().clone().requires_grad_(learns) for x in inputs]
    out = function(*leaves)
    if case.padding_S is not None:
        out = out * (~case.padding_S).to(out.dtype)[:, None, None]
    if not learns:
        return [out]
    weights_S = torch.linspace(-1, 1, len(out), device=out.device).to(out.dtype)
    out.backward(torch.ones_like(out) * weights_S[:, None, None])
    return [out, *(leaf.grad for leaf in leaves)]
