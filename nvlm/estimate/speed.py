"""The time of a step, computed analytically: the encoder, the pipeline, communication that is not hidden, and the host.

nvlm.estimate.pace has what GPUs, links and hosts achieve, nvlm.estimate.traffic the messages.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from nvlm.arch.registry import tile_use
from nvlm.attention.choice import kernels_of
from nvlm.config.hardware import GPU
from nvlm.config.values import Config, pipeline_layers
from nvlm.data.amounts import Work
from nvlm.estimate import pace
from nvlm.estimate.activations import kept
from nvlm.estimate.encoder import learning_parameters, optimizer_shards, sent_bytes
from nvlm.estimate.flops import Flops, hardware_flops, model_flops
from nvlm.estimate.load import Load
from nvlm.estimate.model import linears, model_of
from nvlm.estimate.parameters import carriers_of, held, pipeline_stages_of
from nvlm.estimate.traffic import Spans, Traffic, context_bytes, data_bytes, stage_bytes, tensor_messages, vision_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The time of a step in seconds, on the slowest rank."""

    vision: float  # encoding, and exchanging features
    compute: float  # forward and backward of all micro-batches
    tensor: float  # communication that is not hidden
    context: float
    host: float  # waiting for the host, which launches kernels more slowly than they run
    pipeline: float
    bubble: float  # waiting while the pipeline fills and drains
    data: float
    optimizer: float
    flops: float  # of the whole step, as counted for MFU
    traffic: Traffic

    @property
    def step(self) -> float:
        """Total seconds."""
        return sum(getattr(self, part) for part in PARTS)


PARTS = ("vision", "compute", "tensor", "context", "host", "pipeline", "bubble", "data", "optimizer")


@dataclass(frozen=True, slots=True)
class _Rank:
    """Seconds of a pipeline rank for one micro-batch, forward and backward."""

    compute: float
    tensor: float
    context: float
    host: float  # of launching, at the same time as all else

    @property
    def busy(self) -> float:
        return max(self.compute + self.tensor + self.context, self.host)


def bubble_share(config: Config, micro_batches: int) -> float:
    """Ratio of idle to busy time of a pipeline rank."""
    p = config.parallel
    return (p.pipeline - 1) / (p.virtual * micro_batches)


def speed(config: Config, replicas: int, gpu: GPU, load: Load) -> Speed:
    """The time of steps with `load` on `replicas` x parallel.replica GPUs."""
    p, count, ranks = config.parallel, load.micro_batches, range(config.parallel.pipeline)
    spans = Spans.of(config, replicas, gpu)
    slowest = max(_ranks(config, gpu, load, spans), key=lambda rank: rank.busy)
    most = max((held(config, rank) for rank in ranks), key=lambda held: held.learning)
    reduced, gathered = data_bytes(config, replicas, most)
    own = sent_bytes(config, replicas)  # of an encoder that learns, between all ranks; nothing hides it
    sent = 2 * p.virtual * count * stage_bytes(config, load) if p.pipeline > 1 else 0.0
    features = vision_bytes(config, load)
    alone = slowest.compute + slowest.tensor + slowest.context
    return Speed(
        vision=_encoding(config, gpu, load) + features / spans.replica,
        compute=count * slowest.compute,
        tensor=count * slowest.tensor,
        context=count * slowest.context,
        host=count * (slowest.busy - alone),
        pipeline=0.0 if p.virtual > 1 else sent / spans.pipeline,  # interleaved: overlaps
        bubble=bubble_share(config, count) * count * slowest.busy,
        data=_replicas(config, reduced / spans.data, gathered / spans.data, slowest.busy) + own / spans.pipeline,
        optimizer=_update(config, replicas, gpu, most.learning),
        flops=replicas * load.samples * model_flops(config, load.work).total / load.each,
        traffic=Traffic(
            tensor=count * max(tensor_messages(config, load, rank).size for rank in ranks),
            pipeline=sent,
            context=count * max(context_bytes(config, load, rank) for rank in ranks),
            data=reduced + gathered + own,
            vision=features,
        ),
    )


def _ranks(config: Config, gpu: GPU, load: Load, spans: Spans) -> list[_Rank]:
    """What each pipeline rank spends on a micro-batch."""
    padded = dataclasses.replace(load.work, tokens=load.tokens, keys=load.rows * load.keys)  # attention skips padding
    flops, keys = hardware_flops(config, padded), hardware_flops(config, Work(keys=padded.keys))
    rates, found = pace.rates(config, gpu, load), []
    for rank in range(config.parallel.pipeline):
        stages, messages = pipeline_stages_of(config, rank), tensor_messages(config, load, rank)
        layers = sum(len(pipeline_layers(config, pipeline_stage)) for pipeline_stage in stages)
        carriers = sum(carriers_of(config, pipeline_stage) for pipeline_stage in stages)
        products = _products(config, load, rates, flops, keys, stages)
        found.append(
            _Rank(
                compute=products / config.parallel.tensor + _memory_bound(config, gpu, load, stages, layers),
                tensor=pace.message_seconds(messages.waits, messages.shown, spans.tensor),
                context=context_bytes(config, load, rank) / spans.context,
                host=pace.host_seconds(config, layers, carriers),
            )
        )
    return found


def _products(config: Config, load: Load, rates: pace.Rates, flops: Flops, keys: Flops, stages: list[int]) -> float:
    """Seconds of one GPU for the products of a micro-batch on `stages`, before tensor parallelism divides them.

    `flops`: of the whole model; `keys`: those of them that do not depend on the number of tokens.
    """
    p, carriers_of_all = config.parallel, max(len(model_of(config).carriers), 1)
    layers = sum(len(pipeline_layers(config, pipeline_stage)) for pipeline_stage in stages) / config.llm.layers
    carriers = sum(carriers_of(config, pipeline_stage) for pipeline_stage in stages) / carriers_of_all
    output = flops.output if p.pipeline_stages - 1 in stages else 0.0
    of_tokens = layers * (flops.linears / rates.linears + flops.mlp / rates.mlp + flops.scores / rates.scores)
    of_tokens += carriers * (flops.cross_linears - keys.cross_linears) / rates.cross_linears
    of_tokens += carriers * flops.cross_scores / rates.cross_scores + output / rates.output
    of_keys = carriers * keys.cross_linears / rates.keys
    return of_tokens / p.context + of_keys + _projections(config, load, stages) * flops.projector / rates.projector


def _memory_bound(config: Config, gpu: GPU, load: Load, stages: list[int], layers: int) -> float:
    """Seconds that a micro-batch's work on memory takes: pointwise operations, weight gradients that are added to their
    fp32 sums, and FP8 casts."""
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, recompute="none", offload=False))
    saved = sum(kept(plain, pipeline_stage, load, kernels_of(config)).total for pipeline_stage in stages)
    learning = held(config, stages[0] % config.parallel.pipeline).learning
    size = pace.PASSES * saved + 8 * learning
    if config.precision.recipe:
        widths = sum(one.inputs + one.outputs for branch in model_of(config).plain for one in linears(branch.modules))
        size += pace.CAST * load.tokens / config.parallel.context * layers * widths / config.parallel.tensor
    return size / (pace.MEMORY * gpu.memory_bandwidth)


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
    if config.precision.encoder:
        return share * a_tile / (pace.FP8_ENCODER * gpu.peak(config.precision.name))
    return share * a_tile / (pace.ENCODER * gpu.peak(config.precision.dtype))


def _replicas(config: Config, reduce: float, gather: float, micro_batch: float) -> float:
    """Seconds of reducing gradients and gathering weights that show. If they overlap with computation, the first hides
    behind the last micro-batch's backward pass, the second behind the next step's first forward pass."""
    if not config.parallel.overlap:
        return reduce + gather
    return max(0.0, reduce - micro_batch * 2 / 3) + max(0.0, gather - micro_batch / 3)


def _update(config: Config, replicas: int, gpu: GPU, learning: int) -> float:
    """Seconds of the optimizer: on its shard it scales gradients, reads them, weights and both states, and writes
    weights, both states and bf16 weights; and the whole fp32 gradients are zeroed."""
    shards = replicas * config.parallel.context if config.parallel.distributed_optimizer else 1
    size = (38 / shards + 4) * learning + (38 / optimizer_shards(config, replicas) + 4) * learning_parameters(config)
    return size / (pace.MEMORY * gpu.memory_bandwidth)
