"""Exact parameter counts: of the whole model by module group, and of one rank by cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from nvlm.arch.registry import tile_use
from nvlm.config.modules import Activation, Attention, Linear, Module, Norm, Parameter
from nvlm.config.values import GROUPS, Config, pipeline_layers
from nvlm.estimate.model import computes_in_fp8, model_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Parameter counts of a module group, including adapters."""

    all: int
    learning: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Parameter counts of one rank, without the encoder."""

    all: int
    learning: int
    quantized: int  # in linears that use FP8
    kept_in_fp8: int  # of these, trained ones that are kept only in FP8 (precision.param_gather)
    adapted_in_fp8: int  # and frozen ones beside adapters, which are always kept only in FP8
    largest: int  # the largest trained weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter tensor on a rank, or `count` identical ones."""

    name: str
    group: str  # module group
    size: int
    learns: bool
    quantized: bool = False
    adapted: bool = False  # an adapter learns instead
    count: int = 1


def element_bytes(config: Config) -> int:
    """Bytes of a weight, and of an element of hidden states."""
    return 4 if config.precision.dtype == "fp32" else 2


def pipeline_stages_of(config: Config, rank: int) -> list[int]:
    """The stages (counting virtual stages) on pipeline rank `rank`."""
    p = config.parallel
    return [v * p.pipeline + rank for v in range(p.virtual)]


def carriers_of(config: Config, pipeline_stage: int) -> int:
    """Number of layers with gated cross-attention on a stage."""
    return len(model_of(config).carriers.intersection(pipeline_layers(config, pipeline_stage)))


def parameters(config: Config) -> dict[str, Count]:
    """Parameter counts of the whole model by module group."""
    single = dict(tensor=1, pipeline=1, virtual=1, context=1, context_heads=1, sequence=False)
    whole = replace(config, parallel=replace(config.parallel, **single))
    found = [*encoder_weights(config), *weights(whole, 0)]
    by_group = {group: [weight for weight in found if weight.group == group] for group in GROUPS}
    return {
        group: Count(all=_size(own), learning=_size(weight for weight in own if weight.learns))
        for group, own in by_group.items()
    }


def encoder_parameters(config: Config) -> int:
    """Parameter count of the encoder, which every rank holds; in a frozen one, factors are multiplied into linears."""
    encoder = model_of(config).encoder
    if model_of(config).encoder_learns:
        return _size(encoder_weights(config))
    factors = sum(module.size for module in encoder.layer if isinstance(module, Parameter) and module.factor)
    return _size(encoder_weights(config)) - encoder.layers * factors


def held(config: Config, rank: int) -> Held:
    """Parameter counts on pipeline rank `rank`."""
    found = list(weights(config, rank))
    learning = [weight for weight in found if weight.learns]
    gathers = config.precision.param_gather
    return Held(
        all=_size(found),
        learning=_size(learning),
        quantized=_size(weight for weight in found if weight.quantized),
        kept_in_fp8=_size(weight for weight in learning if weight.quantized and gathers),
        adapted_in_fp8=_size(weight for weight in found if weight.quantized and weight.adapted),
        largest=max((weight.size for weight in learning), default=0),
    )


def _size(found: Iterable[Weight]) -> int:
    return sum(weight.size * weight.count for weight in found)


def encoder_weights(config: Config) -> Iterator[Weight]:
    """The weights of the vision encoder."""
    encoder = model_of(config).encoder
    for modules, count in ((encoder.embedding, 1), (encoder.layer, encoder.layers)):
        yield from weights_of(modules, count=count)


def weights(config: Config, rank: int) -> Iterator[Weight]:
    """The weights on pipeline rank `rank`, without the encoder."""
    model, stages, tensor = model_of(config), pipeline_stages_of(config, rank), config.parallel.tensor
    layers = [layer for pipeline_stage in stages for layer in pipeline_layers(config, pipeline_stage)]
    kinds = Counter((layer in model.carriers, computes_in_fp8(config, layer)) for layer in layers)
    for (carries, fp8), count in kinds.items():
        modules = [module for branch in model.layer(carries) for module in branch.modules]
        yield from weights_of(modules, tensor, fp8, count)
    # The stages of a process share the projector, the norms of keys and tied embeddings.
    apart = (module for pipeline_stage in stages for module in _beside_layers(config, pipeline_stage))
    yield from {weight.name: weight for weight in weights_of(apart, tensor)}.values()


def _beside_layers(config: Config, pipeline_stage: int) -> Iterator[Module]:
    model, use = model_of(config), tile_use(config, pipeline_stage)
    last = pipeline_stage == config.parallel.pipeline_stages - 1
    if pipeline_stage == 0 or (last and config.llm.tied):
        yield model.embedding
    yield from model.head if last else ()
    yield from model.projector if use else ()
    yield from model.key_norms.values() if use.keys else ()


def weights_of(modules: Iterable[Module], tensor: int = 1, fp8: bool = False, count: int = 1) -> Iterator[Weight]:
    """The weights of `count` copies of `modules` on each of `tensor` ranks. `fp8`: linears use FP8."""
    for module in modules:
        if isinstance(module, Activation | Attention):
            continue
        own = dict(group=module.group, learns=module.learns, count=count)
        match module:
            case Linear():
                yield from _linear_weights(module, tensor, fp8, own)
            case Norm(name=name, width=width):
                yield Weight(name=f"{name}.weight", size=width, **own)
                if module.bias:
                    yield Weight(name=f"{name}.bias", size=width, **own)
            case Parameter(name=name, size=size):
                yield Weight(name=name, size=size // tensor if module.split else size, **own)


def _linear_weights(linear: Linear, tensor: int, fp8: bool, own: dict) -> Iterator[Weight]:
    """A linear's weight, bias and adapter."""
    in_parts, out_parts = tensor if linear.split == "inputs" else 1, tensor if linear.split == "outputs" else 1
    inputs, outputs = linear.inputs // in_parts, linear.outputs // out_parts
    if linear.shares is None:
        rows = (linear.outputs + linear.padding) // out_parts
        adapted = linear.adapter > 0
        yield Weight(name=f"{linear.name}.weight", size=inputs * rows, quantized=fp8, adapted=adapted, **own)
    if linear.bias:
        yield Weight(name=f"{linear.name}.bias", size=outputs, **own)
    if linear.adapter:
        beside, own = f"{linear.name}.adapter", own | {"learns": linear.adapts}
        yield Weight(name=f"{beside}.down.weight", size=linear.adapter * inputs, **own)
        yield Weight(name=f"{beside}.up.weight", size=linear.adapter * outputs, **own)
