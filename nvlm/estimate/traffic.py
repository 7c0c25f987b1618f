"""The messages between the GPUs of a run: bytes and numbers by parallel dimension, and how much of them shows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nvlm.arch.registry import tile_use
from nvlm.config.hardware import GPU
from nvlm.config.modules import Attention, Branch, Module
from nvlm.config.values import Config, pipeline_layers
from nvlm.estimate import pace
from nvlm.estimate.load import Load
from nvlm.estimate.memory import token_bytes
from nvlm.estimate.model import linears, model_of
from nvlm.estimate.parameters import Held, carriers_of, element_bytes, pipeline_stages_of


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
class Spans:
    """Bytes/s that messages reach one way in each group. Rank order: tensor, context, data, pipeline."""

    tensor: float
    context: float
    replica: float
    data: float
    pipeline: float

    @classmethod
    def of(cls, config: Config, replicas: int, gpu: GPU) -> Spans:
        """Those of a run on `replicas` x parallel.replica GPUs."""
        p = config.parallel
        sizes = {"tensor": p.tensor, "context": p.tensor * p.context, "data": p.tensor * p.context * replicas}
        whole = p.replica * replicas
        sizes |= {"pipeline": whole, "replica": whole if p.pipeline > 1 else sizes["context"]}
        link, network = pace.LINKS * gpu.link, pace.NETWORK * gpu.network
        return cls(**{name: link if size <= gpu.node else network for name, size in sizes.items()})


@dataclass(frozen=True, slots=True)
class Sent:
    """Messages of a rank."""

    size: float = 0.0  # bytes
    shown: float = 0.0  # bytes that nothing hides
    waits: float = 0.0  # messages that nothing hides

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.size + other.size, self.shown + other.shown, self.waits + other.waits)

    def times(self, count: float) -> Sent:
        """`count` as many."""
        return Sent(count * self.size, count * self.shown, count * self.waits)


def tensor_messages(config: Config, load: Load, rank: int) -> Sent:
    """Between tensor-parallel ranks for one micro-batch on a pipeline rank."""
    p, model = config.parallel, model_of(config)
    if p.tensor == 1:
        return Sent()
    hidden = load.tokens / p.context * config.llm.hidden * element_bytes(config) * (p.tensor - 1) / p.tensor
    stages = pipeline_stages_of(config, rank)
    carriers = sum(carriers_of(config, pipeline_stage) for pipeline_stage in stages)
    plain = sum(len(pipeline_layers(config, pipeline_stage)) for pipeline_stage in stages) - carriers
    found = Sent()
    for branches, count in ((model.plain, plain), (model.carrier, carriers)):
        for branch in branches:
            found += (_scattered if p.sequence else _reduced)(config, branch, hidden).times(count)
    return found + _keys(config, load, stages)


def _keys(config: Config, load: Load, stages: list[int]) -> Sent:
    """The all-reduced gradient of the keys, which nothing hides: once in each (virtual) stage; if cross-attention has
    adapters, in each of its layers."""
    if not load.keys:
        return Sent()
    p, width = config.parallel, config.llm.hidden * element_bytes(config)
    size = 2 * load.rows * load.keys * width * (p.tensor - 1) / p.tensor
    layers = [carriers_of(config, pipeline_stage) for pipeline_stage in stages]
    return Sent(size, size, 1).times(sum(layers) if "xattn" in config.adapted else sum(map(bool, layers)))


def _scattered(config: Config, branch: Branch, hidden: float) -> Sent:
    """Under sequence parallelism, a branch gathers before its first linear and scatters after its last. The backward
    pass gathers the output's gradient, gathers the input again behind another product, and scatters the input's
    gradient behind the product of the weight's gradient, if there is one."""
    again, learns = _again(config, branch), any(one.learns for one in linears(branch.modules))
    gather = hidden / 2 if config.precision.recipe else hidden  # quantized before it is sent
    still = pace.BUFFERED if config.parallel.userbuffers and branch.part != "cross" else 1.0
    shown = Sent(gather + hidden, still * (gather + hidden), still * 2).times(1 + again) + Sent(
        gather, still * gather, still
    )
    hides = still if not learns else 0.0
    return shown + Sent(learns * gather) + Sent(hidden, hides * hidden, hides)


def _reduced(config: Config, branch: Branch, hidden: float) -> Sent:
    """Without sequence parallelism, a branch all-reduces its output and, behind the product of the weight's gradient,
    its input's gradient."""
    again, learns = _again(config, branch), any(one.learns for one in linears(branch.modules))
    back = 0 if learns else 1
    return Sent(2 * hidden, 2 * hidden, 1).times(1 + again) + Sent(2 * hidden, back * 2 * hidden, back)


def _again(config: Config, branch: Branch) -> int:
    """How often a branch is computed again."""
    how = config.train.recompute
    return int(how == "full" or (how == "selective" and branch.part == "mlp"))


def context_bytes(config: Config, load: Load, rank: int) -> float:
    """Bytes between context-parallel ranks for one micro-batch on a pipeline rank."""
    model, stages = model_of(config), pipeline_stages_of(config, rank)
    layers = sum(len(pipeline_layers(config, pipeline_stage)) for pipeline_stage in stages)
    tokens = load.tokens / config.parallel.context
    return layers * sum(_exchanged(config, module, tokens) for branch in model.plain for module in branch.modules)


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


def stage_bytes(config: Config, load: Load) -> float:
    """Bytes of the hidden states of one micro-batch that a rank sends to the next pipeline stage."""
    p = config.parallel
    hidden = load.tokens / p.context * config.llm.hidden * element_bytes(config)
    return hidden / (p.tensor if p.sequence else 1)


def data_bytes(config: Config, replicas: int, parameters: Held) -> tuple[float, float]:
    """Bytes of reduced gradients and of gathered weights between replicas; without the distributed optimizer, of
    all-reduced gradients alone."""
    ranks, learning, in_fp8 = replicas * config.parallel.context, parameters.learning, parameters.kept_in_fp8
    weights = element_bytes(config) * (learning - in_fp8) + in_fp8
    over, gradient = (ranks - 1) / ranks, 2 if config.gradients_in_bf16 else 4
    if not config.parallel.distributed_optimizer:
        return 2 * gradient * learning * over, 0.0
    return gradient * learning * over, weights * over


def vision_bytes(config: Config, load: Load) -> float:
    """Bytes of features that the busiest rank of a replica receives in a step, and of gradients that it returns."""
    seats = config.parallel.replica
    most = 0
    for rank in range(config.parallel.pipeline):
        uses = [tile_use(config, pipeline_stage) for pipeline_stage in pipeline_stages_of(config, rank)]
        stream, keys = any(use.stream for use in uses), any(use.keys for use in uses)
        most = max(most, load.stream_from_tiles * stream + load.keys_from_tiles * keys)
    both = 1 + config.stage.train_vision
    return both * most * load.micro_batches * token_bytes(config) * (seats - 1) / seats
