"""Activations saved for the backward pass, in bytes per rank, tensor by tensor.

Each part of a layer saves the inputs of linears that have trained weights, and what its kernels need. A tensor that two
of them save counts once. Nothing is saved if no gradient flows.

Shapes: T tokens in this rank's columns, P this rank's share of them under sequence parallelism, X keys, H model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from nvlm.arch.registry import tile_use
from nvlm.attention.choice import Kernels
from nvlm.config.modules import Activation, Attention, Branch, Linear, Module, Norm, Parameter
from nvlm.config.values import Config, pipeline_layers
from nvlm.estimate.load import Load
from nvlm.estimate.model import Model, computes_in_fp8, learns, linears, model_of
from nvlm.estimate.parameters import element_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Bytes saved for one micro-batch on one pipeline stage."""

    layers: tuple[float, ...]  # of each layer, under train.recompute
    whole: float  # of the largest layer without recomputation
    shared: float  # shared by all layers: rotary angles and masks
    fusion: float  # projector, norms of keys, keys
    head: float  # final norm, and logits of the tokens with a label
    logits: float  # the part of `head` that is fp32 logits
    output: float  # sent to the next stage

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(self.layers) + self.shared + self.fusion + self.head + self.output


def kept(config: Config, pipeline_stage: int, load: Load, kernels: Kernels) -> Kept:
    """What `pipeline_stage` (counting virtual stages) saves for one micro-batch."""
    model, sizes = model_of(config), _Sizes.of(config, load, kernels)
    layers, whole = _layers(config, model, sizes, pipeline_stage)
    last = pipeline_stage == config.parallel.pipeline_stages - 1
    head, logits = _head(config, model, sizes, load) if last else (0.0, 0.0)
    return Kept(
        layers=layers,
        whole=whole,
        shared=_shared(config, sizes, tile_use(config, pipeline_stage).keys),
        fusion=_fusion(config, model, sizes, pipeline_stage, load),
        head=head + logits,
        logits=logits,
        output=0.0 if last else sizes.own * config.llm.hidden * sizes.element,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Sizes on this rank."""

    config: Config
    kernels: Kernels
    tensor: int
    element: int  # bytes
    tokens: float  # T
    own: float  # P
    keys: float  # X of all rows
    query_key_pairs: float  # in dense masks of self-attention
    query_cross_pairs: float

    def queries(self, attention: Attention) -> float:
        """Bytes of the queries of an attention, or of its output."""
        element = self.kernels.attention or self.element
        return self.tokens * attention.heads * attention.head_dim / self.tensor * element

    @classmethod
    def of(cls, config: Config, load: Load, kernels: Kernels) -> _Sizes:
        p = config.parallel
        tokens, columns = load.tokens / p.context, load.length / p.context
        return cls(
            config=config,
            kernels=kernels,
            tensor=p.tensor,
            element=element_bytes(config),
            tokens=tokens,
            own=tokens / p.tensor if p.sequence else tokens,
            keys=load.rows * load.keys,
            query_key_pairs=load.rows * columns * p.context_heads * load.length,
            query_cross_pairs=load.rows * columns * load.keys,
        )


def _layers(config: Config, model: Model, s: _Sizes, pipeline_stage: int) -> tuple[tuple[float, ...], float]:
    """What each layer saves under train.recompute, and what the largest one saves without recomputation."""
    found, whole, flows = [], 0.0, _flows_in(config, model, pipeline_stage)
    known: dict[tuple, tuple[float, float, bool]] = {}  # there are few kinds of layers
    hidden = s.own * config.llm.hidden * s.element
    for layer in pipeline_layers(config, pipeline_stage):
        kind = (layer in model.carriers, computes_in_fp8(config, layer), flows)
        if kind not in known:
            known[kind] = _layer(model, s, *kind)
        none, selective, flows = known[kind]
        found.append({"none": none, "selective": selective, "full": hidden}[config.train.recompute])
        whole = max(whole, none)
    if config.train.offload:  # the others are in host memory, except one in transfer
        found = found[-2:]
    elif pipeline_stage == 0:  # the first layer's input is a view of the full sequence
        found[0] += (s.tokens - s.own) * config.llm.hidden * s.element
    return tuple(found), whole


def _flows_in(config: Config, model: Model, pipeline_stage: int) -> bool:
    """Whether a gradient flows through the input of the stage's first layer."""
    # Received, recomputed and offloaded inputs require gradients.
    asked = pipeline_stage > 0 or config.train.recompute != "none" or config.train.offload
    return asked or model.stream_learns


def _shared(config: Config, s: _Sizes, keys: bool) -> float:
    """What is saved once for all layers: rotary angles, and masks if whole layers are recomputed."""
    again = config.train.recompute == "full"
    angles = 4 * s.tokens * config.llm.head_dim if again or not s.kernels.rotary else 0
    masks = s.kernels.dense * s.query_key_pairs + (s.kernels.dense_keys and keys) * s.query_cross_pairs
    return angles + masks * again


def _layer(model: Model, s: _Sizes, carries: bool, fp8: bool, flows: bool) -> tuple[float, float, bool]:
    """What a layer saves, the same with its MLP recomputed, and whether a gradient flows through its output."""
    none = selective = 0.0
    tokens = _Tokens(s.own, s.tokens)
    for branch in model.layer(carries):
        before = flows
        kept, flows = _chain(branch.modules, s, tokens, flows, model.keys_learn, fp8)
        none += kept
        selective += _recomputed(branch, s, before, flows) if branch.part == "mlp" else kept
    return none, selective, flows


def _recomputed(branch: Branch, s: _Sizes, flows: bool, flows_out: bool) -> float:
    """What a branch saves if everything after its norm is recomputed.

    `flows`, `flows_out`: a gradient flows through its input, its output.
    """
    [norm, *_] = branch.modules
    kept, _ = _chain([norm], s, _Tokens(s.own, s.tokens), flows)
    return kept + (0 if s.kernels.fused_norm or not flows_out else s.own * norm.width * s.element)


class _Tokens(NamedTuple):
    """Tokens on this rank in a chain of modules."""

    own: float  # in norms, and before linears whose outputs are split
    whole: float  # after these linears


def _chain(
    modules: Iterable[Module], s: _Sizes, tokens: _Tokens, flows: bool, keys_flow: bool = False, fp8: bool = False
) -> tuple[float, bool]:
    """What a sequence of modules saves, and whether a gradient flows through the output of the last one.

    `flows`, `keys_flow`: a gradient flows through the input of the first one, and through the keys. `fp8`: linears use
    FP8.
    """
    kept = attended = 0.0  # `attended`: attention output that the next linear would save as its input
    before: Module | None = None
    for module in modules:
        match module:
            case Norm(heads=heads) if heads:  # its input counts with the attention
                beside = 4 + module.width * s.kernels.normalized * module.learns
                kept += tokens.whole * heads / s.tensor * beside if flows or module.learns else 0
                flows |= module.learns
            case Norm():
                kept += tokens.own * _norm(module, s) if flows or module.learns else 0
                flows |= module.learns
            case Linear(reads_keys=True):
                kept += s.keys * _beside_keys(module, s)
                keys_flow |= module.learns or module.adapts
            case Linear():
                read = _input(module, s, tokens, fp8)
                apart = module.learns and fp8 or module.adapts and s.config.peft.dropout > 0
                kept += read if apart else max(read - attended, 0)
                if flows and module.adapts and isinstance(before, Norm):
                    kept += tokens.own * module.inputs * _normalized(s, fp8)
                attended, flows = 0.0, flows or module.learns or module.adapts
            case Attention():
                flows |= keys_flow and module.sees == "keys"
                kept += _attention(module, s) if flows else 0
                kept += _normed_heads(module, s) if flows and isinstance(before, Norm) else 0
                copied = s.kernels.apart_keys if module.sees == "keys" else s.kernels.apart
                attended = 0.0 if copied else s.queries(module)
            case Activation():
                widths = s.kernels.glu if module.gated else 1
                kept += widths * tokens.whole * module.width / s.tensor * s.element if flows else 0
            case Parameter():  # a factor saves what it multiplies
                kept += tokens.own * s.config.llm.hidden * s.element if module.learns else 0
                flows |= module.learns
        before = module
    return kept, flows


def _normalized(s: _Sizes, fp8: bool) -> int:
    """Bytes per element of a norm's output that a linear fused with it saves, besides what its adapter saves."""
    if not s.kernels.fused_norm:
        return 0
    return 1 if fp8 else s.element * (s.config.peft.dropout > 0)  # without dropout the adapter saves the same tensor


def _norm(norm: Norm, s: _Sizes) -> float:
    """What a norm saves per token: its input, and fp32 statistics."""
    if norm.bias:
        return norm.width * s.element + 8
    return norm.width * ((s.kernels.norm or s.element) + (s.kernels.normalized if norm.learns else 0)) + 4


def _input(linear: Linear, s: _Sizes, tokens: _Tokens, fp8: bool) -> float:
    """What a linear saves: its input if its weight or adapter is trained, and the adapter's dropout mask and hidden
    activations."""
    splits_inputs = linear.split == "inputs"
    elements = (tokens.whole / s.tensor if splits_inputs else tokens.own) * linear.inputs
    if linear.learns:
        return elements * (1 if fp8 else s.element)
    if linear.adapts:
        dropped = elements * (s.config.peft.dropout > 0)
        return (elements + tokens.own * linear.adapter) * s.element + dropped
    return 0.0


def _beside_keys(linear: Linear, s: _Sizes) -> float:
    """What the adapter of a linear saves per key. The keys themselves are one tensor for all layers."""
    dropped = s.config.peft.dropout > 0  # then each layer saves its own input
    return (linear.adapter * s.element + dropped * linear.inputs * (s.element + 1)) if linear.adapts else 0.0


def _attention(attention: Attention, s: _Sizes) -> float:
    """Queries, keys, values, output and logsumexp; also masks, cosines and sines if the kernels save them."""
    k, p, width = s.kernels, s.config.parallel, attention.head_dim
    kv = attention.kv_heads * width / s.tensor * (k.attention or s.element)
    kept = 2 * s.queries(attention) + 4 * s.tokens * attention.heads / s.tensor
    if attention.sees == "keys":
        return kept + 2 * s.keys * kv + 4 * k.dense_keys * s.query_cross_pairs
    keys = values = s.tokens * p.context_mesh[1] * kv  # including those gathered from other ranks
    if k.joint:
        values = s.tokens * (attention.heads + 2 * attention.kv_heads) * width / s.tensor * s.element
    return kept + keys + values + 4 * s.tokens * width * s.element * k.rotary + 4 * k.dense * s.query_key_pairs


def _normed_heads(attention: Attention, s: _Sizes) -> float:
    """The inputs of the norms of queries and keys. Queries of several groups are first copied next to each other."""
    k, queries, keys = s.kernels, attention.heads / s.tensor, attention.kv_heads / s.tensor
    if k.copied:
        return s.tokens * (queries + keys) * attention.head_dim * (k.norm or s.element)
    fused = 0 if k.joint else queries + 2 * keys
    return s.tokens * (fused + queries * (queries > keys > 1)) * attention.head_dim * s.element


def _fusion(config: Config, model: Model, s: _Sizes, pipeline_stage: int, load: Load) -> float:
    """What the projector, the norms of keys and the keys save."""
    use, kept = tile_use(config, pipeline_stage), 0.0
    if use.stream:
        kept += _project(model, s, load.stream_from_tiles / config.parallel.context)
    if use.keys and load.keys:
        tiles = load.keys_from_tiles
        kept += _project(model, s, tiles)
        for kind, norm in model.key_norms.items():
            tokens, front = (tiles, model.projector) if kind == "tile" else (s.keys, (model.embedding,))
            flows = any(map(learns, front)) or (kind == "tile" and model.encoder_learns)
            kept += _chain([norm], s, _Tokens(tokens, tokens), flows)[0]
        kept += s.keys * config.llm.hidden * s.element if _whole_keys(model, s) else 0
    return kept


def _project(model: Model, s: _Sizes, tokens: float) -> float:
    return _chain(model.projector, s, _Tokens(tokens, tokens), flows=model.encoder_learns)[0]


def _whole_keys(model: Model, s: _Sizes) -> bool:
    """Whether the layers of a stage save their keys, one unsplit tensor on each rank."""
    reads = [linear for branch in model.carrier for linear in linears(branch.modules) if linear.reads_keys]
    return any(linear.learns or (linear.adapts and not s.config.peft.dropout) for linear in reads)


def _head(config: Config, model: Model, s: _Sizes, load: Load) -> tuple[float, float]:
    """Final norm and output layer, and the logits in fp32."""
    outputs = load.work.outputs / config.parallel.context
    [norm, output] = model.head
    logits = 4 * outputs * (output.outputs + output.padding) / s.tensor
    kept = s.own * _norm(norm, s) + _input(output, s, _Tokens(outputs, outputs), fp8=False)
    return kept, logits
