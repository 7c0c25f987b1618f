"""The time of a step, computed analytically: the encoder, the pipeline, and communication that is not hidden.

The shares of peak below reproduce published language model runs on H100 (tests/unit/estimate/test_plan.py). They were
not measured with this code; `python benchmarks/gpu.py` does that.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from nvlm.arch.registry import tile_use
from nvlm.attention.choice import kernels_of
from nvlm.config.hardware import GPU
from nvlm.config.modules import Attention, Module
from nvlm.config.values import Config, pipeline_layers
from nvlm.data.amounts import Work
from nvlm.estimate.activations import kept
from nvlm.estimate.flops import Flops, hardware_flops, model_flops
from nvlm.estimate.load import Load
from nvlm.estimate.memory import token_bytes
from nvlm.estimate.model import linears, model_of
from nvlm.estimate.parameters import Held, carriers_of, element_bytes, held, pipeline_stages_of

# Shares of peak FLOP/s, for large matrix products.
PRODUCTS = 0.58
FP8_PRODUCTS = 0.55  # of a peak twice as high: includes casting and scaling
SCORES = 0.45  # attention's two products, in bf16
ENCODER = 0.55  # narrower; includes its attention
LINKS = 0.7  # share of the bandwidth of links and network
PASSES = 4  # times that saved activations are read or written for pointwise operations, forward and backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that a rank sends per step."""

    tensor: float
    pipeline: float
    context: float
    data: float
    vision: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(getattr(self, part.name) for part in dataclasses.fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The time of a step in seconds, on the slowest rank."""

    vision: float  # encoding, and exchanging features
    compute: float  # forward and backward of all micro-batches
    tensor: float  # communication that is not hidden
    context: float
    pipeline: float
    bubble: float  # waiting while the pipeline fills and drains
    data: float
    optimizer: float
    flops: float  # of the whole step, as counted for MFU
    traffic: Traffic

    @property
    def step(self) -> float:
        """Total seconds."""
        parts = ("vision", "compute", "tensor", "context", "pipeline", "bubble", "data", "optimizer")
        return sum(getattr(self, part) for part in parts)


def bubble_share(config: Config, micro_batches: int) -> float:
    """Ratio of idle to busy time of a pipeline rank."""
    p = config.parallel
    return (p.pipeline - 1) / (p.virtual * micro_batches)


def speed(config: Config, replicas: int, gpu: GPU, load: Load) -> Speed:
    """The time of steps with `load` on `replicas` x parallel.replica GPUs."""
    p, count, ranks = config.parallel, load.micro_batches, range(config.parallel.pipeline)
    work = _padded(config, load)
    flops, keys_alone = hardware_flops(config, work), hardware_flops(config, Work(keys=work.keys))
    compute = count * max(_busy(config, gpu, load, flops, keys_alone, rank) for rank in ranks)
    wires = [_wires(config, load, rank) for rank in ranks]
    tensor, context, hidden = (count * max(wire[part] for wire in wires) for part in range(3))
    sent = 2 * p.virtual * hidden if p.pipeline > 1 else 0.0
    most = max((held(config, rank) for rank in ranks), key=lambda held: held.learning)
    learning, gathered = most.learning, _data_bytes(config, replicas, most)
    spans = _Spans.of(config, replicas, gpu)
    vision_bytes = _vision_bytes(config, load)
    tensor_time = tensor * _shown(config) / (LINKS * spans.tensor)
    context_time = context / (LINKS * spans.context)
    pipeline_time = 0.0 if p.virtual > 1 else sent / (LINKS * spans.pipeline)  # interleaved: overlaps
    data_time = gathered / (LINKS * spans.data)
    if p.overlap:  # overlaps with a micro-batch's backward and the next step's first forward pass
        data_time = max(0.0, data_time - compute / count)
    return Speed(
        vision=_encoding(config, gpu, load) + vision_bytes / (LINKS * spans.replica),
        compute=compute,
        tensor=tensor_time,
        context=context_time,
        pipeline=pipeline_time,
        bubble=bubble_share(config, count) * (compute + tensor_time + context_time),
        data=data_time,
        # Reads gradients, weights and both states; writes weights, both states and bf16 weights.
        optimizer=30 * learning / _shards(config, replicas) / gpu.memory_bandwidth,
        flops=replicas * count * model_flops(config, load.work).total,
        traffic=Traffic(tensor=tensor, pipeline=sent, context=context, data=gathered, vision=vision_bytes),
    )


def _padded(config: Config, load: Load) -> Work:
    """The work of a micro-batch including padding, which only attention kernels skip."""
    return dataclasses.replace(load.work, tokens=load.tokens, keys=load.rows * load.keys)


def _products(config: Config, gpu: GPU, fp8: bool) -> float:
    """Achieved FLOP/s of large matrix products."""
    if fp8 and config.precision.recipe:
        return FP8_PRODUCTS * gpu.peak(config.precision.name)
    return PRODUCTS * gpu.peak(config.precision.dtype)


def _busy(config: Config, gpu: GPU, load: Load, flops: Flops, keys: Flops, rank: int) -> float:
    """Seconds of computation on a rank for one micro-batch, forward and backward."""
    p, stages = config.parallel, pipeline_stages_of(config, rank)
    layers = sum(len(pipeline_layers(config, pipeline_stage)) for pipeline_stage in stages) / config.llm.layers
    carriers = sum(carriers_of(config, pipeline_stage) for pipeline_stage in stages) / max(
        len(model_of(config).carriers), 1
    )
    products = layers * (flops.linears + flops.mlp) + carriers * (flops.cross_linears - keys.cross_linears)
    scores = layers * flops.scores + carriers * flops.cross_scores
    output = flops.output if p.pipeline_stages - 1 in stages else 0.0
    rate, plain = _products(config, gpu, fp8=True), _products(config, gpu, fp8=False)
    seconds = products / p.context / rate + output / p.context / plain + carriers * keys.cross_linears / rate
    seconds += scores / p.context / (SCORES * gpu.peak(config.precision.dtype))
    seconds += _projections(config, load, stages) * flops.projector / plain
    kept_bytes = sum(kept(_plain(config), pipeline_stage, load, kernels_of(config)).total for pipeline_stage in stages)
    return seconds / p.tensor + PASSES * kept_bytes / gpu.memory_bandwidth


def _plain(config: Config) -> Config:
    """`config` without recomputation and offloading."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, recompute="none", offload=False))


def _projections(config: Config, load: Load, stages: list[int]) -> float:
    """A rank's share of the projection of a micro-batch's tiles: every stage with keys projects them itself."""
    tokens = 0.0
    for use in (tile_use(config, pipeline_stage) for pipeline_stage in stages):
        tokens += load.stream_from_tiles / config.parallel.context * use.stream + load.keys_from_tiles * use.keys
    return tokens / max(load.work.projected, 1)


def _encoding(config: Config, gpu: GPU, load: Load) -> float:
    """Seconds for encoding, with tiles distributed over the ranks of a replica."""
    share = math.ceil(load.tiles / config.parallel.replica)
    a_tile = hardware_flops(config, Work(tiles=1)).vision
    fp8 = config.precision.encoder
    peak = gpu.peak(config.precision.name if fp8 else config.precision.dtype)
    return share * a_tile / (ENCODER * peak)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spans:
    """One-way bandwidth in bytes/s within each group. Rank order: tensor, context, data, pipeline."""

    tensor: float
    context: float
    replica: float
    data: float
    pipeline: float

    @classmethod
    def of(cls, config: Config, replicas: int, gpu: GPU) -> _Spans:
        p = config.parallel
        sizes = {"tensor": p.tensor, "context": p.tensor * p.context, "data": p.tensor * p.context * replicas}
        whole = p.replica * replicas
        sizes |= {"pipeline": whole, "replica": whole if p.pipeline > 1 else sizes["context"]}
        return cls(**{name: gpu.link if size <= gpu.node else gpu.network for name, size in sizes.items()})


def _shown(config: Config) -> float:
    """The share of tensor-parallel traffic that is not hidden: the forward pass; the backward overlaps."""
    again = 1 if config.train.recompute == "full" else 0
    forward = 4 * (1 + again)
    return forward / (forward + 6) if config.parallel.sequence else (1 + again) / (2 + again)


def _wires(config: Config, load: Load, rank: int) -> tuple[float, float, float]:
    """Bytes that a rank sends per micro-batch: tensor, context, and hidden states to the next stage."""
    p, model, element = config.parallel, model_of(config), element_bytes(config)
    tokens = load.tokens / p.context
    hidden = tokens * config.llm.hidden * element
    stages = pipeline_stages_of(config, rank)
    carriers = sum(carriers_of(config, pipeline_stage) for pipeline_stage in stages)
    plain = sum(len(pipeline_layers(config, pipeline_stage)) for pipeline_stage in stages) - carriers
    branches = [(branch, count) for kind, count in ((model.plain, plain), (model.carrier, carriers)) for branch in kind]
    again = config.train.recompute == "full"
    # With sequence parallelism, a branch gathers and scatters in both passes, and gathers once more for its weight
    # gradients; without it, all-reduces in both passes. The gradient of the keys is all-reduced.
    each = (5 + 2 * again) if p.sequence else (4 + 2 * again)
    over = (p.tensor - 1) / p.tensor
    widths = sum(n * one.inputs for branch, n in branches for one in linears(branch.modules) if one.reads_keys)
    tensor = sum(n for _, n in branches) * each * hidden + 2 * load.rows * load.keys * widths * element
    context = sum(n * _exchanged(config, module, tokens) for branch, n in branches for module in branch.modules)
    return over * tensor, context, hidden / (p.tensor if p.sequence else 1)


def _exchanged(config: Config, module: Module, tokens: float) -> float:
    """Bytes that context-parallel ranks send for a module: gathered keys and values of self-attention, and the
    all-to-all of columns and heads."""
    if not isinstance(module, Attention) or module.sees == "keys":
        return 0.0
    element, p = element_bytes(config), config.parallel
    q, kv = (2 * heads * module.head_dim / p.tensor * element for heads in (module.heads, module.kv_heads))
    heads, outer = p.context_mesh
    passes = 2 + (config.train.recompute == "full")
    return passes * tokens * ((outer - 1) * kv + (heads - 1) / heads * (q + kv))


def _shards(config: Config, replicas: int) -> int:
    return replicas * config.parallel.context if config.parallel.distributed_optimizer else 1


def _data_bytes(config: Config, replicas: int, parameters: Held) -> float:
    """Reduce-scattered fp32 gradients and gathered weights; all-reduced gradients without the distributed optimizer."""
    ranks, learning, in_fp8 = replicas * config.parallel.context, parameters.learning, parameters.kept_in_fp8
    weights = element_bytes(config) * (learning - in_fp8) + in_fp8
    back = weights if config.parallel.distributed_optimizer else 4 * learning
    return (4 * learning + back) * (ranks - 1) / ranks


def _vision_bytes(config: Config, load: Load) -> float:
    """Bytes of features that the busiest rank of a replica receives."""
    seats = config.parallel.replica
    most = 0
    for rank in range(config.parallel.pipeline):
        uses = [tile_use(config, pipeline_stage) for pipeline_stage in pipeline_stages_of(config, rank)]
        stream, keys = any(use.stream for use in uses), any(use.keys for use in uses)
        most = max(most, load.stream_from_tiles * stream + load.keys_from_tiles * keys)
    return most * load.micro_batches * token_bytes(config) * (seats - 1) / seats
