"""How long a step takes, by arithmetic: the encoder's pass, the pipeline, and what of the communication shows.

The shares of peak below reproduce published runs of language models on H100 (tests/unit/estimate/test_plan.py). They
were not measured with this code; `python benchmarks/gpu.py` does that.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

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
from nvlm.estimate.parameters import Held, carriers_of, element_bytes, held, pipeline_stages_of, uses_tiles

# Of the peak, while large products are computed.
PRODUCTS = 0.58
FP8_PRODUCTS = 0.55  # of a peak twice as high: casts and scales come with them
SCORES = 0.45  # attention's two products, in bf16
ENCODER = 0.55  # narrower, and its attention with it
LINKS = 0.7  # of a link's or network's bandwidth
PASSES = 4  # how often what is kept crosses the memory, for norms, activations and residuals, forward and backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that a rank sends in a step."""

    tensor: float
    pipeline: float
    context: float
    data: float
    vision: float

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(getattr(self, part.name) for part in dataclasses.fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of a step. Seconds, of the slowest rank."""

    vision: float  # encoding, and handing features over
    compute: float  # forward and backward of all micro-batches
    tensor: float  # communication that shows
    context: float
    pipeline: float
    bubble: float  # waiting for the pipeline to fill and to drain
    data: float
    optimizer: float
    flops: float  # of the whole step, as MFU counts them
    traffic: Traffic

    @property
    def step(self) -> float:
        """All of it."""
        parts = ("vision", "compute", "tensor", "context", "pipeline", "bubble", "data", "optimizer")
        return sum(getattr(self, part) for part in parts)


def bubble_share(config: Config, micro_batches: int) -> float:
    """Idle time to busy time of a pipeline rank."""
    p = config.parallel
    return (p.pipeline - 1) / (p.virtual * micro_batches)


def speed(config: Config, replicas: int, gpu: GPU, load: Load) -> Speed:
    """Of steps like `load` on `replicas` x parallel.replica GPUs."""
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
    pipeline_time = 0.0 if p.virtual > 1 else sent / (LINKS * spans.pipeline)  # interleaved stages send beside products
    data_time = gathered / (LINKS * spans.data)
    if p.overlap:  # behind a micro-batch's backward and the next step's first forward
        data_time = max(0.0, data_time - compute / count)
    return Speed(
        vision=_encoding(config, gpu, load) + vision_bytes / (LINKS * spans.replica),
        compute=compute,
        tensor=tensor_time,
        context=context_time,
        pipeline=pipeline_time,
        bubble=bubble_share(config, count) * (compute + tensor_time + context_time),
        data=data_time,
        # Gradients, weights and both states are read, all but the gradients written, and bf16 weights.
        optimizer=30 * learning / _shards(config, replicas) / gpu.memory_bandwidth,
        flops=replicas * count * model_flops(config, load.work).total,
        traffic=Traffic(tensor=tensor, pipeline=sent, context=context, data=gathered, vision=vision_bytes),
    )


def _padded(config: Config, load: Load) -> Work:
    """A micro-batch as it is computed. Attention's kernels skip padding."""
    return dataclasses.replace(load.work, tokens=load.tokens, keys=load.rows * load.keys)


def _products(config: Config, gpu: GPU, fp8: bool) -> float:
    """FLOP/s of large products."""
    if fp8 and config.precision.recipe:
        return FP8_PRODUCTS * gpu.peak(config.precision.name)
    return PRODUCTS * gpu.peak(config.precision.dtype)


def _busy(config: Config, gpu: GPU, load: Load, flops: Flops, keys: Flops, rank: int) -> float:
    """Seconds that a rank computes for one micro-batch, forward and backward."""
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
    """The run with all that it makes kept where it is."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, recompute="none", offload=False))


def _projections(config: Config, load: Load, stages: list[int]) -> float:
    """How much of a micro-batch's projecting a rank does: each stage with keys projects them for itself."""
    tokens = 0.0
    for use in (uses_tiles(config, pipeline_stage) for pipeline_stage in stages):
        tokens += load.stream_from_tiles / config.parallel.context * use.stream + load.keys_from_tiles * use.keys
    return tokens / max(load.work.projected, 1)


def _encoding(config: Config, gpu: GPU, load: Load) -> float:
    """Seconds of the encoder's pass: its tiles dealt over the ranks of a replica."""
    share = math.ceil(load.tiles / config.parallel.replica)
    a_tile = hardware_flops(config, Work(tiles=1)).vision
    fp8 = config.precision.encoder
    peak = gpu.peak(config.precision.name if fp8 else config.precision.dtype)
    return share * a_tile / (ENCODER * peak)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spans:
    """Bytes/s one way within each group. Ranks are numbered tensor first, then context, data, pipeline."""

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
    """Part of the tensor-parallel traffic that nothing hides: the forward's. The backward's runs beside products."""
    again = 1 if config.train.recompute == "full" else 0
    forward = 4 * (1 + again)
    return forward / (forward + 6) if config.parallel.sequence else (1 + again) / (2 + again)


def _wires(config: Config, load: Load, rank: int) -> tuple[float, float, float]:
    """Bytes that a rank sends for one micro-batch: tensor, context, and hidden states to a neighbour."""
    p, model, element = config.parallel, model_of(config), element_bytes(config)
    tokens = load.tokens / p.context
    hidden = tokens * config.llm.hidden * element
    stages = pipeline_stages_of(config, rank)
    carriers = sum(carriers_of(config, pipeline_stage) for pipeline_stage in stages)
    plain = sum(len(pipeline_layers(config, pipeline_stage)) for pipeline_stage in stages) - carriers
    branches = [(branch, count) for kind, count in ((model.plain, plain), (model.carrier, carriers)) for branch in kind]
    again = config.train.recompute == "full"
    # With sequence parallelism a branch gathers and scatters, forward and backward, and gathers once more for its
    # weights' gradients; without it sums forward and backward. The keys' gradient is summed.
    each = (5 + 2 * again) if p.sequence else (4 + 2 * again)
    over = (p.tensor - 1) / p.tensor
    widths = sum(n * one.inputs for branch, n in branches for one in linears(branch.modules) if one.reads_keys)
    tensor = sum(n for _, n in branches) * each * hidden + 2 * load.rows * load.keys * widths * element
    context = sum(n * _exchanged(config, module, tokens) for branch, n in branches for module in branch.modules)
    return over * tensor, context, hidden / (p.tensor if p.sequence else 1)


def _exchanged(config: Config, module: Module, tokens: float) -> float:
    """Bytes that context-parallel ranks send of a module's columns: keys and values of self-attention gathered, and
    columns traded for heads."""
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
    """Gradients in fp32 to their owners and updated weights back; without owners gradients to all."""
    ranks, learning, in_fp8 = replicas * config.parallel.context, parameters.learning, parameters.kept_in_fp8
    weights = element_bytes(config) * (learning - in_fp8) + in_fp8
    back = weights if config.parallel.distributed_optimizer else 4 * learning
    return (4 * learning + back) * (ranks - 1) / ranks


def _vision_bytes(config: Config, load: Load) -> float:
    """Features that the busiest rank of a replica receives."""
    seats = config.parallel.replica
    most = 0
    for rank in range(config.parallel.pipeline):
        uses = [uses_tiles(config, pipeline_stage) for pipeline_stage in pipeline_stages_of(config, rank)]
        stream, keys = any(use.stream for use in uses), any(use.keys for use in uses)
        most = max(most, load.stream_from_tiles * stream + load.keys_from_tiles * keys)
    return most * load.micro_batches * token_bytes(config) * (seats - 1) / seats
