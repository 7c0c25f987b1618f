"""What a forward pass keeps for the backward pass, in bytes of one rank, tensor by tensor.

Each part of a layer keeps the inputs of its linears, where a weight beside them learns, and what its own kernels want
again. Tensors that two of them keep count once. Nothing is kept where no gradient passes.

Shapes: T tokens of this rank's columns, P of them this rank's own under sequence parallelism, X keys, H model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvlm.attention.choice import Kernels
from nvlm.config.values import Config, pipeline_layers
from nvlm.estimate.load import Load
from nvlm.estimate.parameters import element_bytes, layer_kind, learning_groups, uses_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Of one micro-batch on one pipeline stage, bytes."""

    layers: tuple[float, ...]  # of each layer, as train.recompute has it
    whole: float  # of the layer that keeps most, nothing recomputed
    shared: float  # by all layers: rotary angles and masks
    fusion: float  # projector, norms of keys, keys
    head: float  # final norm, and logits of the tokens with a label
    logits: float  # of these the logits, fp32
    output: float  # what is sent to the next stage

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.layers) + self.shared + self.fusion + self.head + self.output


def kept(config: Config, pipeline_stage: int, load: Load, kernels: Kernels) -> Kept:
    """What stage `stage` (virtual ones counted) keeps of a micro-batch."""
    sizes = _Sizes.of(config, load, kernels)
    layers, whole = _layers(config, sizes, pipeline_stage)
    last, learns = pipeline_stage == config.parallel.pipeline_stages - 1, "llm" in sizes.learns
    outputs = load.work.outputs / config.parallel.context if last else 0.0
    logits = 4 * outputs * config.llm.padded_vocab / config.parallel.tensor
    head = sizes.norm(learns) + outputs * config.llm.hidden * sizes.element * learns if last else 0.0
    return Kept(
        layers=layers,
        whole=whole,
        shared=_shared(config, sizes, uses_tiles(config, pipeline_stage).keys),
        fusion=_fusion(config, sizes, pipeline_stage, load),
        head=head + logits,
        logits=logits,
        output=0.0 if last else sizes.hidden,
    )


def _layers(config: Config, s: _Sizes, pipeline_stage: int) -> tuple[tuple[float, ...], float]:
    """What each layer keeps as train.recompute has it, and the most that one does with nothing recomputed."""
    found, whole, flows = [], 0.0, _flows_in(config, s, pipeline_stage)
    known: dict[tuple, tuple[float, float, bool]] = {}  # layers are of few kinds
    for layer in pipeline_layers(config, pipeline_stage):
        kind = (*layer_kind(config, layer), flows)
        if kind not in known:
            known[kind] = _layer(config, s, *kind)
        none, selective, flows = known[kind]
        found.append({"none": none, "selective": selective, "full": s.hidden}[config.train.recompute])
        whole = max(whole, none)
    if config.train.offload:  # the others wait in the host's memory, but for one on its way
        found = found[-2:]
    elif pipeline_stage == 0:
        found[0] += s.unsplit
    return tuple(found), whole


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Of this rank. Bytes, but for the tokens."""

    kernels: Kernels
    element: int
    tokens: float  # T
    own: float  # P
    hidden: float  # [P, H]
    unsplit: float  # what the first layer's input holds beyond [P, H], of whose whole it is a view
    keys: float  # X of all rows
    query_key_pairs: float  # of dense masks: self-attention's
    query_cross_pairs: float
    learns: frozenset[str]  # module groups whose own weights do
    adapts: frozenset[str]  # those whose adapters do

    @classmethod
    def of(cls, config: Config, load: Load, kernels: Kernels) -> _Sizes:
        p, h, (learns, adapts) = config.parallel, config.llm.hidden, learning_groups(config)
        element = element_bytes(config)
        tokens = load.tokens / p.context
        own = tokens / p.tensor if p.sequence else tokens
        columns = load.length / p.context
        return cls(
            kernels=kernels,
            element=element,
            tokens=tokens,
            own=own,
            hidden=own * h * element,
            unsplit=(tokens - own) * h * element,
            keys=load.rows * load.keys,
            query_key_pairs=load.rows * columns * p.context_heads * load.length,
            query_cross_pairs=load.rows * columns * load.keys,
            learns=learns,
            adapts=adapts,
        )

    def norm(self, learns: bool) -> float:
        """What a norm of [P, H] keeps; `learns`: its weight does."""
        return self.hidden / self.element * self.normed(learns) + 4 * self.own

    def normed(self, learns: bool) -> int:
        """What a norm keeps, bytes an element."""
        return (self.kernels.norm or self.element) + (self.kernels.normalized if learns else 0)


def _shared(config: Config, s: _Sizes, keys: bool) -> float:
    """What all layers keep together: rotary angles, and masks where whole layers are computed again."""
    again = config.train.recompute == "full"
    angles = 4 * s.tokens * config.llm.head_dim if again or not s.kernels.rotary else 0
    masks = s.kernels.dense * s.query_key_pairs + (s.kernels.dense_keys and keys) * s.query_cross_pairs
    return angles + masks * again


def _flows_in(config: Config, s: _Sizes, pipeline_stage: int) -> bool:
    """Whether a gradient passes through the input of the stage's first layer."""
    # Received, recomputed and offloaded inputs ask for one.
    if pipeline_stage > 0 or config.train.recompute != "none" or config.train.offload:
        return True
    return "llm" in s.learns or ("projector" in s.learns and uses_tiles(config, 0).stream)


def _layer(config: Config, s: _Sizes, crosses: bool, fp8: bool, flows: bool) -> tuple[float, float, bool]:
    """What a layer keeps, the same with its MLP recomputed, and whether a gradient passes its output."""
    attention, flows = _attention(config, s, fp8, flows)
    cross, flows = _cross_attention(config, s, fp8, flows) if crosses else (0.0, flows)
    mlp, first, flows = _mlp(config, s, fp8, flows)
    return attention + cross + mlp, attention + cross + first, flows


def _input(config: Config, s: _Sizes, group: str, fp8: bool, elements: float) -> float:
    """What a linear keeps: its input, where a weight beside it learns, and of its adapter the dropout mask and the
    middle."""
    if group in s.learns:
        return elements * (1 if fp8 else s.element)
    if group in s.adapts:
        return (elements + s.own * config.peft.rank) * s.element + elements * (config.peft.dropout > 0)
    return 0.0


def _attention(config: Config, s: _Sizes, fp8: bool, flows: bool) -> tuple[float, bool]:
    llm, p, k = config.llm, config.parallel, s.kernels
    learns, adapts = "llm" in s.learns, "llm" in s.adapts
    if not (flows or learns or adapts):
        return 0.0, False
    q, kv = llm.heads * llm.head_dim / p.tensor, llm.kv_heads * llm.head_dim / p.tensor
    element, outer = k.attention or s.element, p.context_mesh[1]  # keys of other ranks are gathered
    queries, keys = s.tokens * q * element, s.tokens * outer * kv * element
    values = s.tokens * (q + 2 * kv) * s.element if k.joint else keys
    kept = queries + keys + values + queries + 4 * s.tokens * llm.heads / p.tensor
    kept += 4 * s.tokens * llm.head_dim * s.element * k.rotary + 4 * k.dense * s.query_key_pairs
    kept += s.norm(learns) if flows or learns else 0
    kept += _input(config, s, "llm", fp8, s.own * llm.hidden)
    behind = _input(config, s, "llm", fp8, s.tokens * q)
    dropped = adapts and config.peft.dropout > 0
    apart = k.apart or fp8 or dropped  # the linear behind attention keeps a tensor of its own
    return kept + (behind if apart else max(behind - queries, 0)), True


def _cross_attention(config: Config, s: _Sizes, fp8: bool, flows: bool) -> tuple[float, bool]:
    llm, tensor, k = config.llm, config.parallel.tensor, s.kernels
    learns, adapts = "xattn" in s.learns, "xattn" in s.adapts
    if not (flows or learns or adapts or "projector" in s.learns):
        return 0.0, False
    q, kv = llm.heads * llm.head_dim / tensor, llm.kv_heads * llm.head_dim / tensor
    element = k.attention or s.element
    queries = s.tokens * q * element
    kept = 2 * queries + 2 * s.keys * kv * element + 4 * s.tokens * llm.heads / tensor
    kept += 4 * k.dense_keys * s.query_cross_pairs
    kept += s.norm(learns) if flows or learns else 0
    kept += _input(config, s, "xattn", fp8, s.own * llm.hidden)
    dropped = adapts and config.peft.dropout > 0
    if adapts:
        kept += s.keys * (config.peft.rank * s.element + dropped * llm.hidden * (s.element + 1))
    behind = _input(config, s, "xattn", fp8, s.tokens * q)
    kept += behind if k.apart_keys or fp8 or dropped else max(behind - queries, 0)
    return kept + (s.hidden if learns else 0), True  # the gate wants what it is multiplied with


def _mlp(config: Config, s: _Sizes, fp8: bool, flows: bool) -> tuple[float, float, bool]:
    """What it keeps, what with its middle recomputed, and whether a gradient passes."""
    learns, adapts = "llm" in s.learns, "llm" in s.adapts
    if not (flows or learns or adapts):
        return 0.0, 0.0, False
    llm, inner = config.llm, s.tokens * config.llm.ffn / config.parallel.tensor
    norm = s.norm(learns) if flows or learns else 0
    kept = norm + _input(config, s, "llm", fp8, s.own * llm.hidden)
    kept += s.kernels.glu * inner * s.element + _input(config, s, "llm", fp8, inner)
    return kept, norm + (0 if s.kernels.fused_norm else s.hidden), True


def _fusion(config: Config, s: _Sizes, pipeline_stage: int, load: Load) -> float:
    """Projected tiles in the stream, and keys."""
    use, learns = uses_tiles(config, pipeline_stage), "projector" in s.learns
    h = config.llm.hidden
    kept = 0.0
    if use.stream and learns:
        kept += load.stream_from_tiles / config.parallel.context * _projected(config, s)
    if use.keys and load.keys:
        tokens = load.keys_from_tiles
        kept += tokens * _projected(config, s) if learns else 0
        normed = h * s.normed("xattn" in s.learns) + 4
        words = config.arch.name == "hybrid" and ("xattn" in s.learns or "llm" in s.learns)
        kept += tokens * normed if learns or "xattn" in s.learns else 0
        kept += s.keys * normed if words else 0
        # One tensor for all layers of the pipeline stage, whole on each rank; with dropout each layer keeps its own.
        whole = "xattn" in s.learns or ("xattn" in s.adapts and not config.peft.dropout)
        kept += s.keys * h * s.element if whole else 0
    return kept


def _projected(config: Config, s: _Sizes) -> float:
    """Bytes that the projector keeps of a tile's token: around its norm, and inside its MLP."""
    width = config.vision.hidden * config.vision.downsample**2
    inner = 0 if config.arch.name == "xattn" else 2 * config.llm.ffn / config.parallel.tensor
    return (2 * width + inner) * s.element + 8
