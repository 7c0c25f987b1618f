"""Does the software of a GPU machine load and compute: versions, and Transformer Engine's linears in bf16 and FP8.

    python benchmarks/gpu_check.py

To run first, in seconds. Each line stands on its own: what fails is printed as FAILED, and the next line follows.
Errors of the linears should be near 0.003 in bf16 and 0.04 in FP8.
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the package is not installed

MODULES = ("triton", "transformers", "numpy", "PIL", "megatron.core", "hydra", "omegaconf", "datasets", "pydantic")
RECIPES = (None, "Float8CurrentScaling", "Float8BlockScaling")  # None: bf16


def main() -> int:
    """Print a line for each check; returns how many failed, at most 1."""
    checks: list[tuple[str, Callable[[], str]]] = [("torch", torch_line)]
    checks += [(module, lambda module=module: version(module)) for module in MODULES]
    checks += [("transformer_engine", engine_line), ("nvlm", lambda: version("nvlm.commands.compose"))]
    checks += [(f"linear, {recipe or 'bf16'}", lambda recipe=recipe: linear_line(recipe)) for recipe in RECIPES]
    return int(any([line(name, check).startswith("FAILED") for name, check in checks]))


def line(name: str, check: Callable[[], str]) -> str:
    """Print what `check` says, or its exception, and how long it took."""
    began = time.perf_counter()
    try:
        told = check()
    except Exception as error:
        told = f"FAILED: {type(error).__name__}: {str(error).strip()[:400]}"
    print(f"{name:28} {told}  ({time.perf_counter() - began:.1f} s)", flush=True)
    return told


def version(module: str) -> str:
    """Import it."""
    return str(getattr(importlib.import_module(module), "__version__", "imported"))


def torch_line() -> str:
    """torch, its libraries and the GPU."""
    import torch

    if not torch.cuda.is_available():
        return f"{torch.__version__}, no GPU"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}, {torch.cuda.get_device_name()}"


def engine_line() -> str:
    """Transformer Engine and the cuDNN that it found. torch comes first: it loads the libraries that both need."""
    import torch  # noqa: F401
    import transformer_engine
    import transformer_engine.pytorch as te

    return f"{transformer_engine.__version__}, cuDNN {te.get_cudnn_version()}"


def linear_line(recipe_name: str | None) -> str:
    """Error of a norm and a linear relative to fp32, and that a gradient comes back."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU"
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    torch.manual_seed(0)
    shape = dict(bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16, device="cuda")
    linear = te.LayerNormLinear(256, 512, **shape)
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    how = getattr(recipe, recipe_name)() if recipe_name else None
    with te.autocast(enabled=how is not None, recipe=how):
        out = linear(x)
    out.float().square().mean().backward()
    exact_x = x.detach().float()
    normed = exact_x * torch.rsqrt(exact_x.square().mean(-1, keepdim=True) + linear.eps)
    exact = normed @ linear.weight.detach().float().t()
    error = float((out.float() - exact).norm() / exact.norm())
    return f"error {error:.2g}, gradient {float(x.grad.float().norm()):.3g}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
