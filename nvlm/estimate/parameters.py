"""Parameters that one rank holds, exactly, by what they cost: those that learn, and those that compute in FP8."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nvlm.arch.registry import placement_rule
from nvlm.config.values import Config, pipeline_layers
from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import TileUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Parameters of one rank, the encoder left out."""

    all: int
    learning: int
    quantized: int  # of linears that compute in FP8
    kept_in_fp8: int  # of those: with precision.param_gather what learns, of which there is nothing but FP8
    largest: int  # of one weight that learns


@dataclass(frozen=True, slots=True)
class _Weight:
    group: str  # module group
    size: int  # on this rank
    quantized: bool = False
    adapter: bool = False
    count: int = 1  # of such weights


def element_bytes(config: Config) -> int:
    """Of a weight, and of an element that passes between layers."""
    return 4 if config.precision.dtype == "fp32" else 2


def pipeline_stages_of(config: Config, rank: int) -> list[int]:
    """Stages (virtual ones counted) on pipeline rank `rank`."""
    p = config.parallel
    return [v * p.pipeline + rank for v in range(p.virtual)]


def uses_tiles(config: Config, pipeline_stage: int) -> TileUse:
    """What the stage does with tiles, as nvlm.arch.base.tile_use tells from the architecture's modules."""
    in_stream, in_keys = _places(config.arch.name)
    return TileUse(stream=pipeline_stage == 0 and in_stream, keys=in_keys and carriers_of(config, pipeline_stage) > 0)


@functools.cache
def _places(arch: str) -> tuple[bool, bool]:
    """Whether an architecture puts tiles into the text stream, and among the keys."""
    plan = TilePlan(2, 1, 1)
    stream, keys = placement_rule(arch)(plan, [()] * plan.num_tiles, [1] * plan.num_tiles).from_tiles
    return stream > 0, keys > 0


def carriers_of(config: Config, pipeline_stage: int) -> int:
    """Layers with gated cross-attention on a stage."""
    layers, every = pipeline_layers(config, pipeline_stage), config.arch.cross_every
    return layers.stop // every - layers.start // every if every else 0


def held(config: Config, rank: int) -> Held:
    """What a process on pipeline rank `rank` holds."""
    weights = list(_weights(config, rank))
    own, adapters = learning_groups(config)
    learning = [weight for weight in weights if weight.group in (adapters if weight.adapter else own)]
    gathers = config.precision.param_gather
    return Held(
        all=sum(weight.size * weight.count for weight in weights),
        learning=sum(weight.size * weight.count for weight in learning),
        quantized=sum(weight.size * weight.count for weight in weights if weight.quantized),
        kept_in_fp8=sum(weight.size * weight.count for weight in learning if weight.quantized and gathers),
        largest=max((weight.size for weight in learning), default=0),
    )


def learning_groups(config: Config) -> tuple[frozenset[str], frozenset[str]]:
    """Module groups whose own weights learn, and those whose adapters do."""
    learning, adapted = frozenset(config.stage.trainable), frozenset(config.adapted)
    return learning - adapted, learning & adapted


def _weights(config: Config, rank: int) -> Iterator[_Weight]:
    llm, tensor, stages = config.llm, config.parallel.tensor, pipeline_stages_of(config, rank)
    last = config.parallel.pipeline_stages - 1
    words = llm.padded_vocab * llm.hidden // tensor
    if 0 in stages or (last in stages and llm.tied):
        yield _Weight("llm", words)
    if last in stages:
        yield _Weight("llm", llm.hidden)
        if not llm.tied:
            yield _Weight("llm", words)
    layers = [layer for pipeline_stage in stages for layer in pipeline_layers(config, pipeline_stage)]
    for (crosses, fp8), count in Counter(layer_kind(config, layer) for layer in layers).items():
        for weight in _layer(config, crosses, fp8):
            yield replace(weight, count=count)
    uses = [uses_tiles(config, pipeline_stage) for pipeline_stage in stages]
    if any(uses):  # virtual stages of a process share one projector, and norms of keys
        yield from _projector(config)
    if any(use.keys for use in uses):
        yield _Weight("xattn", llm.hidden * {"xattn": 1, "hybrid": 2}[config.arch.name])


def layer_kind(config: Config, layer: int) -> tuple[bool, bool]:
    """Whether decoder layer `layer` (from 0) carries cross-attention, and whether it computes in FP8."""
    every, edges = config.arch.cross_every, config.precision.edges
    fp8 = config.precision.recipe is not None and edges <= layer < config.llm.layers - edges
    return every > 0 and (layer + 1) % every == 0, fp8


def _layer(config: Config, crosses: bool, fp8: bool) -> Iterator[_Weight]:
    llm, tensor = config.llm, config.parallel.tensor
    h, q, kv = llm.hidden, llm.heads * llm.head_dim // tensor, llm.kv_heads * llm.head_dim // tensor
    ffn = llm.ffn // tensor
    yield _Weight("llm", 2 * h)
    if llm.qkv_bias:
        yield _Weight("llm", q + 2 * kv)
    yield from _linear(config, "llm", h, q + 2 * kv, fp8)
    yield from _linear(config, "llm", q, h, fp8)
    yield from _linear(config, "llm", h, 2 * ffn, fp8)
    yield from _linear(config, "llm", ffn, h, fp8)
    if crosses:
        yield _Weight("xattn", h + 1)  # norm and gate
        yield from _linear(config, "xattn", h, q, fp8)
        yield from _linear(config, "xattn", h, 2 * kv, fp8)
        yield from _linear(config, "xattn", q, h, fp8)


def _linear(config: Config, group: str, inputs: int, outputs: int, fp8: bool) -> Iterator[_Weight]:
    """A linear with what the rank has of its inputs and outputs, and the adapter beside it."""
    yield _Weight(group, inputs * outputs, fp8)
    if group in config.adapted:
        yield _Weight(group, config.peft.rank * inputs, adapter=True)
        yield _Weight(group, config.peft.rank * outputs, adapter=True)


def _projector(config: Config) -> Iterator[_Weight]:
    llm, tensor = config.llm, config.parallel.tensor
    width = config.vision.hidden * config.vision.downsample**2
    yield _Weight("projector", 2 * width)
    if config.arch.name == "xattn":
        yield _Weight("projector", width * llm.hidden // tensor)
    else:
        yield _Weight("projector", width * llm.ffn // tensor)
        yield _Weight("projector", llm.ffn * llm.hidden // tensor)
