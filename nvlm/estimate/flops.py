"""FLOPs, computed analytically for real tokens, tiles and keys, without padding. Imports no torch.

Matrix products are counted, with two FLOPs per multiply-add: the encoder, the projector, the language model's linears,
attention (visible query-key pairs only, so half a square for a causal mask) and the output layer. Not counted:
embeddings, norms, rotary embedding, softmax, activation functions, gates, the loss, the optimizer.

The backward pass counts only what the run needs: gradients of trained weights, and gradients of inputs if anything
before them is trained. So a frozen language model costs input gradients if the projector before it is trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from nvlm.config.modules import Attention, Branch, EncoderModules, Linear, Module, Norm, Parameter
from nvlm.config.values import Config
from nvlm.data.amounts import Addable, Work
from nvlm.estimate.model import Model, model_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops(Addable):
    """FLOPs by part. `linears` and `scores` belong to self-attention; `scores` are both of its products."""

    vision: float = 0.0
    projector: float = 0.0
    linears: float = 0.0
    scores: float = 0.0
    mlp: float = 0.0
    cross_linears: float = 0.0
    cross_scores: float = 0.0
    output: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(getattr(self, f.name) for f in fields(self))

    def times(self, count: int) -> Flops:
        """FLOPs of `count` identical ones."""
        return Flops(**{f.name: count * getattr(self, f.name) for f in fields(self)})


# The fields of Flops for the linears and the attention products of a branch, by its part.
_FIELDS = {"attention": ("linears", "scores"), "cross": ("cross_linears", "cross_scores"), "mlp": ("mlp", "scores")}


def forward(config: Config, work: Work) -> Flops:
    """FLOPs of a forward pass."""
    model, carriers = model_of(config), len(model_of(config).carriers)
    projector, _ = _forward(model.projector, Work(tokens=work.projected))
    output, _ = _forward(model.head, Work(tokens=work.outputs))
    found = Flops(vision=work.tiles * _tile(model.encoder), projector=projector, output=output)
    for carries, count in ((False, config.llm.layers - carriers), (True, carriers)):
        for branch in model.layer(carries):
            found += _flops(branch, *_forward(branch.modules, work)).times(count)
    return found


def backward(config: Config, work: Work, whole: bool = False) -> Flops:
    """FLOPs of a backward pass. `whole`: gradients flow down to the embedding regardless, as with recomputed layers."""
    model, flows = model_of(config), whole or model_of(config).stream_learns
    projector, _, _ = _backward(model.projector, Work(tokens=work.projected), flows=model.encoder_learns)
    vision = work.tiles * _tile_backward(model.encoder) if model.encoder_learns else 0
    kinds, found = Counter(), {}
    for layer in range(config.llm.layers):
        kind = (layer in model.carriers, flows)
        if kind not in found:
            found[kind] = _layer_backward(model, work, *kind)
        kinds[kind] += 1
        flows = found[kind][1]
    layers = sum((found[kind][0].times(count) for kind, count in kinds.items()), Flops())
    output, _, _ = _backward(model.head, Work(tokens=work.outputs), flows)
    return layers + Flops(vision=vision, projector=projector, output=output)


def model_flops(config: Config, work: Work) -> Flops:
    """What training on `work` takes at least, however it is done: MFU is counted by it."""
    return forward(config, work) + backward(config, work)


# What is computed again, by train.recompute.
_AGAIN = {"none": (), "selective": ("mlp",), "full": ("linears", "scores", "mlp", "cross_linears", "cross_scores")}


def hardware_flops(config: Config, work: Work) -> Flops:
    """`model_flops`, what `train.recompute` adds, and an encoder's second forward pass, if it learns. Padding counts if
    `work` includes it."""
    first, how, learns = forward(config, work), config.train.recompute, model_of(config).encoder_learns
    again = Flops(**{part: getattr(first, part) for part in _AGAIN[how]})
    if learns:
        layers = work.tiles * _tile(replace(model_of(config).encoder, embedding=())) if how == "full" else 0
        again += Flops(vision=first.vision + layers)
    return first + backward(config, work, whole=how != "none") + again


def _tile(encoder: EncoderModules) -> int:
    """FLOPs to encode one tile."""
    tokens = encoder.tokens
    embedding = _forward(encoder.embedding, Work(tokens=encoder.patches))
    layer = _forward(encoder.layer, Work(tokens=tokens, pairs=tokens**2))
    return sum(embedding) + encoder.layers * sum(layer)


def _tile_backward(encoder: EncoderModules) -> int:
    """FLOPs of the backward pass of one tile. The pixels need no gradient."""
    tokens = encoder.tokens
    *embedding, flows = _backward(encoder.embedding, Work(tokens=encoder.patches), flows=False)
    *layer, _ = _backward(encoder.layer, Work(tokens=tokens, pairs=tokens**2), flows)
    return sum(embedding) + encoder.layers * sum(layer)


def _flops(branch: Branch, linears: int, scores: int) -> Flops:
    return Flops(**dict(zip(_FIELDS[branch.part], (linears, scores))))


def _forward(modules: Iterable[Module], work: Work) -> tuple[int, int]:
    """FLOPs of the linears among `modules`, and of the attention products."""
    linears = scores = 0
    for module in modules:
        if isinstance(module, Linear):
            size = module.inputs * module.outputs + module.adapter * (module.inputs + module.outputs)
            linears += 2 * size * (work.keys if module.reads_keys else work.tokens)
        elif isinstance(module, Attention):
            scores += _product_pair(module, work)
    return linears, scores


def _product_pair(attention: Attention, work: Work) -> int:
    """FLOPs of both products of an attention: queries with keys, probabilities with values."""
    pairs = work.cross_pairs if attention.sees == "keys" else work.pairs
    return 4 * attention.heads * attention.head_dim * pairs


def _layer_backward(model: Model, work: Work, carries: bool, flows: bool) -> tuple[Flops, bool]:
    """FLOPs of a decoder layer, and whether its output needs a gradient. `flows`: something before it is trained."""
    found = Flops()
    for branch in model.layer(carries):
        linears, scores, flows = _backward(branch.modules, work, flows, model.keys_learn)
        found += _flops(branch, linears, scores)
    return found, flows


def _backward(modules: Iterable[Module], work: Work, flows: bool, keys_flow: bool = False) -> tuple[int, int, bool]:
    """FLOPs of linears and of attention products, and whether the output of the last module needs a gradient.

    `flows`, `keys_flow`: something before the first module, before the keys, is trained.
    """
    linears = scores = 0
    for module in modules:
        match module:
            case Linear(reads_keys=True):
                linears += work.keys * _linear_backward(module, keys_flow)
                keys_flow = keys_flow or module.learns or module.adapts
            case Linear():
                linears += work.tokens * _linear_backward(module, flows)
                flows = flows or module.learns or module.adapts
            case Attention(sees=sees):
                queries, keys = flows, keys_flow if sees == "keys" else flows
                flows = queries or keys
                # One product each for the gradients of probabilities, values, queries and keys.
                scores += (flows + keys + queries + keys) * _product_pair(module, work) // 2
            case Norm() | Parameter():
                flows = flows or module.learns
    return linears, scores, flows


def _linear_backward(linear: Linear, flows: bool) -> int:
    """FLOPs per token. `flows`: something before its input is trained."""
    base = linear.inputs * linear.outputs * (flows + linear.learns)
    down = linear.inputs * (flows + linear.adapts)
    up = linear.outputs * ((flows or linear.adapts) + linear.adapts)
    return 2 * (base + linear.adapter * (down + up))
