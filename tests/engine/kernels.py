"""The functions that Transformer Engine's layers call in their compiled extension, computed by torch on a CPU.

Transformer Engine's Python code decides everything that can be wrong without a GPU: which tensor is used where, what is
kept for the backward pass, what is quantized and when, which gradient goes where. Its extension
`transformer_engine_torch` does the arithmetic. `install()` puts this module in the extension's place, so that the
Python code runs here unchanged.

Covered: dense linears, RMSNorm, packed attention, rotary angles, Adam, and FP8 with one scale per tensor (delayed and
current scaling). Any other function raises NotImplementedError with its name. Results are those of an ideal kernel:
products are summed in fp32 and rounded once.
"""

from __future__ import annotations

import enum
import functools
import importlib.machinery
import importlib.metadata
import math
import os
import sys
import types
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.engine.overlap import (  # noqa: F401
    CommOverlap,
    CommOverlapHelper,
    CommOverlapP2P,
    CommOverlapType,
    device_supports_multicast,
    get_stream_priority_range,
    ubuf_built_with_mpi,
)

CAPABILITY = (9, 0)  # of the GPU that is answered for: Hopper's, whose FP8 products want both operands' rows


class DType(enum.IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


_TORCH = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}
_OPERANDS = ("INPUT", "WEIGHT", "OUTPUT")
FP8FwdTensors = enum.IntEnum("FP8FwdTensors", [f"GEMM{n}_{what}" for n in (1, 2, 3) for what in _OPERANDS], start=0)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"GRAD_{what}{n}" for n in (1, 2, 3) for what in ("OUTPUT", "INPUT")], start=0
)
NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend", {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
)


class _Missing:
    """Stands for parts of the extension that are missing here: may be named, but not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self._name}.{name}")

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"transformer_engine_torch.{self._name} has no CPU form in tests/engine/kernels.py")

    def __int__(self) -> int:  # of an enumeration's members, told apart by it
        return zlib.crc32(self._name.encode())

    def __repr__(self) -> str:
        return self._name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Missing) and other._name == self._name

    def __hash__(self) -> int:
        return hash(self._name)


def __getattr__(name: str) -> _Missing:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Missing(name)


def install(packages: Path) -> None:
    """Make `import transformer_engine` work, from the pure Python package below `packages`. Call it before Megatron's
    first import, which looks whether Transformer Engine is there."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its name for: the CUDA libraries need not be there
    sys.path.insert(0, str(packages))
    root = types.ModuleType("transformer_engine")
    root.__path__ = [str(packages / "transformer_engine")]
    root.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None, is_package=True)
    root.__version__ = importlib.metadata.version("transformer_engine")
    sys.modules.update({"transformer_engine": root, "transformer_engine_torch": sys.modules[__name__]})
    onnx = types.ModuleType("transformer_engine.pytorch.onnx_extensions")  # wants packages that nothing here uses
    onnx.__getattr__ = __getattr__
    sys.modules[onnx.__name__] = onnx
    properties = types.SimpleNamespace(
        major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132, total_memory=2**36, name="none"
    )
    torch.cuda.get_device_properties = lambda *args: properties
    torch.cuda.get_device_capability = lambda *args: CAPABILITY
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: None
    torch.Tensor.cuda = lambda x, *args, **kwargs: x
    # In a backward pass torch looks at no mode, so nvlm.processes.device does not hear of these.
    for name in ("arange", "empty", "empty_like", "ones", "tensor", "zeros"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.to = _on_cpu(torch.Tensor.to)
    available, is_cuda = torch.cuda.is_available, torch._C.TensorBase.is_cuda
    torch.cuda.is_available = lambda: _asked_by_its_checks() or available()
    torch.Tensor.is_cuda = property(lambda x: _asked_by_its_checks() or is_cuda.__get__(x))
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch
    from transformer_engine.pytorch import distributed

    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    root.common, root.pytorch = transformer_engine.common, transformer_engine.pytorch


def _on_cpu(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs | ({"device": "cpu"} if str(kwargs.get("device")).startswith("cuda") else {}))

    return call


def _asked_by_its_checks() -> bool:
    """Whether the caller's caller is one of the few places where Transformer Engine refuses tensors that are not on a
    GPU."""
    return sys._getframe(2).f_globals["__name__"] in _CHECKS


_CHECKS = {
    "transformer_engine.pytorch.module.base",
    "transformer_engine.pytorch.attention.dot_product_attention.backends",
    "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention",
}


def _plain(x) -> Tensor:
    """The values of a tensor, quantized or not, in fp32."""
    return x.dequantize(dtype=torch.float32) if hasattr(x, "_quantizer") else x.float()


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def generic_gemm(
    A, transa, B, transb, D, quantizer, out_dtype, bias, bias_type, gelu, gelu_in, grad, workspace, workspace_size,
    accumulate, use_split_accumulator, comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap=False,
    alpha=1.0, beta=0.0,
):  # fmt: skip
    """op(B) op(A) in cuBLAS's column order: (product, gradient of the bias, input of GELU, extra output).

    `comm_overlap`: a buffer, whose exchange of kind `comm_type` is part of the product or beside it (`bulk_overlap`).
    """
    assert not gelu and quantizer is None
    if comm_type is CommOverlapType.AG:
        comm_overlap.gather(apart=bulk_overlap)
    elif comm_type is CommOverlapType.RS and bulk_overlap:
        comm_overlap.scatter_itself()
    a, b = _plain(A), _plain(B)
    for operand, transposed in ((A, not transa), (B, transb)):
        _check_fp8_operand(operand, transposed)
    out = alpha * ((_flat(b).T if transb else _flat(b)) @ (_flat(a).T if transa else _flat(a)))
    bias_grad = None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = _flat(b).sum(0).to(bias.dtype)
        else:
            out = out + bias.float()
    if not transb:
        out = out.view(*b.shape[:-1], out.shape[-1])
    if D is not None:
        D.copy_((D.float() if accumulate else 0) + out.view_as(D))
        return D, bias_grad, None, extra_output
    dtype = _TORCH[DType(int(out_dtype))] if out_dtype is not None else A.dtype
    if comm_type is CommOverlapType.RS and not bulk_overlap:
        comm_overlap.scatter(_flat(out.to(dtype)), extra_output, apart=False)
    return out.to(dtype), bias_grad, None, extra_output


def _check_fp8_operand(operand, columns: bool) -> None:
    """Hopper multiplies rows of both operands in FP8, so columns need a transposed copy. The summed dimension must be a
    multiple of 16, the other a multiple of 8."""
    if not hasattr(operand, "_quantizer"):
        return
    kept = operand._transpose if columns else operand._data
    assert kept is not None and not (columns and operand._transpose_invalid), "an operand's layout is not there"
    rows = math.prod(kept.shape[:-1]) if not columns else kept.shape[0]
    inner = kept.shape[-1] if not columns else math.prod(kept.shape[1:])
    assert inner % 16 == 0 and rows % 8 == 0, f"FP8 products of {tuple(kept.shape)}"


def quantize(tensor: Tensor, quantizer, output=None, noop=None):
    """`tensor` in the quantizer's FP8; into `output` if given."""
    assert noop is None or not noop
    out = output if output is not None else create_empty_quantized_tensor(
        quantizer, list(tensor.shape), tensor.dtype, tensor.device, False
    )  # fmt: skip
    source = _plain(tensor)
    kind = type(quantizer).__name__
    dtype = _TORCH[DType(int(quantizer.dtype))]
    amax = source.abs().max().float() if source.numel() else torch.zeros(())
    if kind == "Float8Quantizer":
        scale = quantizer.scale.float().reshape(())
        if quantizer.amax.numel():  # none where weights are made of fp32 ones, whose largest values are known
            quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.view_as(quantizer.amax)))
    elif kind == "Float8CurrentScalingQuantizer":
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, quantizer.amax_reduction_group)
        scale = _scale(amax, dtype, quantizer.amax_epsilon, quantizer.force_pow_2_scales)
    else:
        raise NotImplementedError(f"{kind} has no CPU form in tests/engine/kernels.py")
    limit = torch.finfo(dtype).max
    data = (source * scale).clamp(-limit, limit).to(dtype).view(torch.uint8)
    if out._data is not None:
        out._data.copy_(data)
    out._scale_inv.copy_((1 / scale).view_as(out._scale_inv))
    if quantizer.columnwise_usage:
        transposed = data.reshape(-1, data.shape[-1]).T.reshape(data.shape[-1], *data.shape[:-1]).contiguous()
        if out._transpose is None:
            out._transpose = transposed
        else:
            out._transpose.copy_(transposed)
    out._transpose_invalid = not quantizer.columnwise_usage
    return out


def _scale(amax: Tensor, dtype: torch.dtype, epsilon: float, power_of_two: bool) -> Tensor:
    amax = amax.clamp_min(epsilon)
    scale = torch.where((amax > 0) & amax.isfinite(), torch.finfo(dtype).max / amax, torch.ones(()))
    scale = scale.clamp_max(torch.finfo(torch.float32).max)
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_two else scale


def create_empty_quantized_tensor(quantizer, shape: Sequence[int], dtype, device, pin_memory: bool):
    """A tensor with one scale and uninitialized bytes."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    def empty(*shape):
        return torch.empty(shape, dtype=torch.uint8, device=device)

    parts = dict(
        data=empty(*shape) if quantizer.rowwise_usage else None,
        fp8_scale_inv=torch.empty(1, device=device),
        fp8_dtype=quantizer.dtype,
        data_transpose=empty(shape[-1], *shape[:-1]) if quantizer.columnwise_usage else None,
        quantizer=quantizer,
    )
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **parts)
    return Float8Tensor(shape=shape, dtype=dtype, device=device, **parts)


def dequantize(tensor, dtype) -> Tensor:
    return tensor.dequantize(dtype=_TORCH[DType(int(dtype))])


def bgrad_quantize(grad: Tensor, quantizer):
    """Gradient of a bias, and its source in quantized form."""
    return _flat(grad).float().sum(0).to(grad.dtype), quantize(grad, quantizer)


def fp8_transpose(data: Tensor, dtype, *, out: Tensor | None = None) -> Tensor:
    transposed = _flat(data).T.reshape(data.shape[-1], *data.shape[:-1]).contiguous()
    return transposed if out is None else out.copy_(transposed)


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.copy_(tensor.abs().max().float().reshape(amax.shape))


def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: Tensor, amax_histories, scales, amax_compute_algo: str, fp8_dtype, margin: float
) -> None:
    """Delayed scaling: each history gets the newest maximum, and its scale is computed from the history."""
    limit = torch.finfo(_TORCH[DType(int(fp8_dtype))]).max
    newest = amax_reduction_buffer.split([history.shape[1] for history in amax_histories])
    for now, history, scale in zip(newest, amax_histories, scales, strict=True):
        amax = history.amax(0) if amax_compute_algo == "max" else history[0].clone()
        amax = torch.maximum(amax, now) if amax_compute_algo == "max" else now
        history.copy_(torch.roll(history, -1, 0))
        history[0].zero_()
        if len(history) > 1:
            history[-1].copy_(now)
        fresh = limit / amax / 2**margin
        scale.copy_(torch.where((amax > 0) & amax.isfinite(), fresh, scale))


def rmsnorm_fwd(x, weight, eps, out, quantizer, out_dtype, sm_margin, zero_centered_gamma):
    """(x / rms(x) * weight, None, 1 / rms(x)), quantized if there is a quantizer."""
    rsigma = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
    normed = x.float() * rsigma[..., None] * (weight.float() + zero_centered_gamma)
    normed = normed.to(_TORCH[DType(int(out_dtype))])
    if quantizer is not None:
        return quantize(normed, quantizer, out), None, rsigma
    return normed if out is None else out.copy_(normed), None, rsigma


def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
    """Gradients of x and of the weight."""
    normed = x.float() * rsigma[..., None]
    dnormed = dz.float() * (gamma.float() + zero_centered_gamma)
    dx = rsigma[..., None] * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (_flat(dz.float() * normed)).sum(0).to(gamma.dtype)


def layernorm_fwd(x, weight, bias, eps, out, quantizer, out_dtype, sm_margin, zero_centered_gamma):
    """((x - mean) / deviation * weight + bias, mean, 1 / deviation), quantized if there is a quantizer."""
    mean = x.float().mean(-1)
    centered = x.float() - mean[..., None]
    rsigma = torch.rsqrt(centered.pow(2).mean(-1) + eps)
    normed = centered * rsigma[..., None] * (weight.float() + zero_centered_gamma) + bias.float()
    normed = normed.to(_TORCH[DType(int(out_dtype))])
    if quantizer is not None:
        return quantize(normed, quantizer, out), mean, rsigma
    return normed if out is None else out.copy_(normed), mean, rsigma


def layernorm_bwd(dz, x, mean, rsigma, gamma, sm_margin, zero_centered_gamma):
    """Gradients of x, of the weight and of the bias."""
    normed = (x.float() - mean[..., None]) * rsigma[..., None]
    dnormed = dz.float() * (gamma.float() + zero_centered_gamma)
    about = dnormed.mean(-1, keepdim=True) + normed * (dnormed * normed).mean(-1, keepdim=True)
    dx = rsigma[..., None] * (dnormed - about)
    return dx.to(x.dtype), _flat(dz.float() * normed).sum(0).to(gamma.dtype), _flat(dz.float()).sum(0).to(gamma.dtype)


def get_cudnn_version() -> int:
    return torch.backends.cudnn.version() or 91200


def get_fused_attn_backend(params):
    """cuDNN's if `_attend` can do the same, else the reason why not."""
    asked = (_member(params.qkv_layout), _member(params.attn_mask_type))
    if asked in _ATTENDED:
        return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""
    return NVTE_Fused_Attn_Backend.NVTE_No_Backend, f"no CPU form of {asked} in tests/engine/kernels.py"


_ATTENDED = {
    ("NVTE_THD_THD_THD", "NVTE_PADDING_CAUSAL_MASK"),
    ("NVTE_SBHD_SBHD_SBHD", "NVTE_CAUSAL_MASK"),
    ("NVTE_SBHD_SBHD_SBHD", "NVTE_NO_MASK"),
}


def _member(of_enumeration) -> str:
    return repr(of_enumeration).rpartition(".")[2]


def _samples(cu_seqlens: Tensor) -> list[slice]:
    ends = cu_seqlens.tolist()
    return [slice(begin, end) for begin, end in zip(ends, ends[1:])]


def _attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float, layout, mask) -> Tensor:
    """[T, N, D], each token attending within its own sample, or [S, B, N, D], within its row."""
    assert (_member(layout), _member(mask)) in _ATTENDED
    causal = _member(mask).endswith("CAUSAL_MASK")
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=causal, scale=scale, enable_gqa=True
    )
    if q.dim() == 4:
        return attend(*(x.permute(1, 2, 0, 3) for x in (q, k, v))).permute(2, 0, 1, 3).contiguous()
    out = torch.zeros_like(q)
    for sample in _samples(ends):
        out[sample] = attend(*(x[sample].transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)
    return out


def fused_attn_fwd(
    max_seqlen_q, max_seqlen_kv, is_training, attn_scale, dropout, zero_fill, layout, o_format, scale_format,
    bias_type, mask_type, softmax_type, window, bottom_right, cu_seqlens_q, cu_seqlens_kv, q, k, v, *rest,
):  # fmt: skip
    """[output, softmax statistics, generator state]; only the size of the last two matters."""
    assert dropout == 0 and torch.equal(cu_seqlens_q, cu_seqlens_kv) and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
    out = _attend(q, k, v, cu_seqlens_q, attn_scale, layout, mask_type)
    return [out, q.new_zeros(*q.shape[:-1], 1, dtype=torch.float32), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q, max_seqlen_kv, attn_scale, dropout, zero_fill, layout, o_format, do_format, dqkv_layout,
    scale_format, do_scale_format, bias_type, mask_type, softmax_type, window, bottom_right, deterministic,
    cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, *rest,
):  # fmt: skip
    """[gradients of q, k, v; none of a bias or an offset]."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = _attend(*leaves, cu_seqlens_q, attn_scale, layout, mask_type)
    return [*torch.autograd.grad(out, leaves, d_o.view_as(out)), None, None]


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, rows: int, columns: int) -> Tensor:
    out = tensor.new_zeros(rows, columns, *tensor.shape[1:])
    for row, sample in zip(out, _samples(cu_seqlens)):
        row[: sample.stop - sample.start] = tensor[sample]
    return out


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    out = tensor.new_zeros(tokens, *tensor.shape[2:])
    for row, sample in zip(tensor, _samples(cu_seqlens)):
        out[sample] = row[: sample.stop - sample.start]
    return out


def _turned(x: Tensor, freqs: Tensor, sign: int) -> Tensor:
    """Rotary embedding applied to [S, B, N, D] with angles [S, 1, 1, D]."""
    half = x.float().chunk(2, -1)
    turned = torch.cat((-half[1], half[0]), -1)
    return (x.float() * freqs.cos() + sign * turned * freqs.sin()).to(x.dtype)


def fused_rope_forward(x, freqs, start_positions, layout, interleaved, cu_seqlens, cp_size, cp_rank):
    assert not interleaved and cu_seqlens is None and cp_size == 1 and start_positions is None
    assert freqs.shape[1:3] == (1, 1) and freqs.shape[0] >= x.shape[0] and freqs.dtype == torch.float32
    return _turned(x, freqs[: x.shape[0]], 1)


def fused_rope_backward(grad, freqs, start_positions, layout, interleaved, cu_seqlens, cp_size, cp_rank):
    return _turned(grad, freqs[: grad.shape[0]], -1)


def fused_qkv_rope_forward(qkv, q_freqs, k_freqs, start_positions, widths, layout, interleaved, cp_size, cp_rank):
    assert qkv.is_contiguous() and start_positions is None
    query, key, value = qkv.split(list(widths), dim=-1)
    query = query.reshape(*qkv.shape[:2], -1, widths[1])
    query = fused_rope_forward(query, q_freqs, None, layout, interleaved, None, cp_size, cp_rank)
    key = fused_rope_forward(key, k_freqs, None, layout, interleaved, None, cp_size, cp_rank)
    return query, key, value.contiguous()


def fused_qkv_rope_backward(query, key, value, q_freqs, k_freqs, widths, layout, interleaved, cp_size, cp_rank):
    query = fused_rope_backward(query, q_freqs, None, layout, interleaved, None, cp_size, cp_rank)
    key = fused_rope_backward(key, k_freqs, None, layout, interleaved, None, cp_size, cp_rank)
    return torch.cat((query.reshape(*key.shape[:3], widths[0]), key, value), -1)


def multi_tensor_l2norm(chunk_size, noop, tensor_lists, per_tensor=False):
    norms = torch.stack([x.float().norm() for x in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else torch.empty(0)


def multi_tensor_scale(chunk_size, noop, tensor_lists, scale) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size, noop, tensor_lists, limit: float, power_of_two: bool, epsilon: float
) -> None:
    dtype = {torch.finfo(dtype).max: dtype for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}[limit]
    for amax, scale, inverse in zip(*tensor_lists, strict=True):
        scale.copy_(_scale(amax, dtype, epsilon, power_of_two))
        inverse.copy_(1 / scale)


def multi_tensor_adam(
    chunk_size, noop, tensor_lists, lr, beta1, beta2, epsilon, step, adamw, bias_correction, weight_decay
) -> None:
    """AdamW on (gradient, parameter, first moment, second moment[, fp32 master weight])."""
    assert adamw
    one, two = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, first, second, *masters in zip(*tensor_lists, strict=True):
        g, weight = gradient.float(), (masters[0] if masters else parameter).float()
        first.copy_(beta1 * first.float() + (1 - beta1) * g)
        second.copy_(beta2 * second.float() + (1 - beta2) * g * g)
        update = first.float() / one / ((second.float() / two).sqrt() + epsilon) + weight_decay * weight
        weight = weight - lr * update
        for target in (parameter, *masters):
            target.copy_(weight)
