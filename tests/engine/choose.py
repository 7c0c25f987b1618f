"""Makes a process use Transformer Engine's layers although there is no GPU."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from pathlib import Path

from tests.engine import kernels

PACKAGES = Path(sys.prefix, "engine")
"""Where `make install` puts the Python part of Transformer Engine, out of sight of everything else."""


def prepare(fused_gradients: bool = True) -> None:
    """Have `nvlm` choose Transformer Engine's layers, also in fp32, where results can be compared to rounding, and pack
    rows as on a GPU. Before Megatron's first import.

    `fused_gradients`: weight gradients are added to Megatron's buffers, which a model must have then.
    """
    assert "megatron.core" not in sys.modules
    kernels.install(PACKAGES)
    import torch
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    from nvlm.attention import choice
    from nvlm.attention.kernels import flex
    from nvlm.llm import backend, build
    from nvlm.processes import device

    device._use_torch_optimizers = lambda: None  # Transformer Engine's own, on the kernels from here
    backend.this_machine = lambda: choice.GPU_WITH_TE
    choice.uses_engine = lambda config, machine: True
    if not fused_gradients:
        plain = build.base_config
        build.base_config = lambda config, **shape: plain(config, **shape | {"gradient_accumulation_fusion": False})

    class Blocks(torch.autograd.Function):
        """FlexAttention, which has no backward pass on CPU, replaced by a dense mask from its blocks; it keeps what
        FlexAttention keeps."""

        @staticmethod
        def attend(query_BNSD, key_BGXD, value_BGXD, seen: BlockMask, scale):
            shape = len(query_BNSD), None, query_BNSD.shape[2], key_BGXD.shape[2]
            mask = create_mask(seen.mask_mod, *shape, device="cpu")
            return torch.nn.functional.scaled_dot_product_attention(
                query_BNSD, key_BGXD, value_BGXD, attn_mask=mask, scale=scale, enable_gqa=True
            )

        @staticmethod
        def forward(ctx, query_BNSD, key_BGXD, value_BGXD, seen, scale):
            out_BNSD = Blocks.attend(query_BNSD, key_BGXD, value_BGXD, seen, scale)
            logsumexp_BNS = query_BNSD.new_zeros(query_BNSD.shape[:-1], dtype=torch.float32)
            ctx.save_for_backward(query_BNSD, key_BGXD, value_BGXD, out_BNSD, logsumexp_BNS)
            ctx.rest = seen, scale
            return out_BNSD

        @staticmethod
        def backward(ctx, grad_BNSD):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors[:3]]
                out_BNSD = Blocks.attend(*leaves, *ctx.rest)
            return *torch.autograd.grad(out_BNSD, leaves, grad_BNSD), None, None

    flex.attend_blocks = Blocks.apply
    _gather_one_by_one()


def _gather_one_by_one() -> None:
    """Weights of two types, FP8 and bf16, are gathered in one call, which NCCL supports; gloo mixes up their bytes."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    together, start = buffers._coalescing_manager, buffers._ParamAndGradBucketGroup.start_param_sync
    gather = buffers.dist_all_gather_func

    @contextlib.contextmanager
    def apart(group, async_ops=False):
        yield types.SimpleNamespace(wait=lambda: None)

    def start_apart(*args, **kwargs):
        buffers._coalescing_manager = apart
        buffers.dist_all_gather_func = lambda *args, async_op, **kwargs: gather(*args, **kwargs)
        try:
            return start(*args, **kwargs)
        finally:
            buffers._coalescing_manager, buffers.dist_all_gather_func = together, gather

    buffers._ParamAndGradBucketGroup.start_param_sync = start_apart


def prepare_forked() -> None:
    """The same for the server that tests.dist.run forks processes from."""
    os.environ["NVLM_TEST_PRELOAD"] = "tests.engine.server"
