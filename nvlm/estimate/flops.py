"""Floating-point operations by arithmetic, on what is real: tokens, tiles and keys, no padding, no torch.

Counted are matrix products, two FLOPs for each multiply-add: the encoder's, the projector's, the language model's
linears, attention (of query-key pairs that see each other, so a causal triangle is a triangle) and the output layer.
Not counted: embeddings, norms, rotary, softmax, activations, gates, the loss, the optimizer.

A backward pass counts what this run needs: gradients of weights that learn, and gradients of inputs behind which
something learns. So a frozen language model costs its inputs' gradients where the projector stands below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from nvlm.config.values import Config, VisionConfig, cross_layers
from nvlm.data.amounts import Addable, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops(Addable):
    """By part. `linears` and `scores` are self-attention's, the latter both of its products."""

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
        """Of all parts."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, slots=True)
class _Linear:
    """A matrix product of each token: FLOPs a token."""

    inputs: int
    outputs: int
    learns: bool
    rank: int = 0  # of the adapter beside it; 0: none
    adapts: bool = False  # the adapter learns

    @property
    def forward(self) -> int:
        return 2 * (self.inputs * self.outputs + self.rank * (self.inputs + self.outputs))

    def backward(self, flows: bool) -> int:
        """`flows`: something learns behind its input."""
        base = self.inputs * self.outputs * (flows + self.learns)
        down = self.inputs * (flows + self.adapts)
        up = self.outputs * ((flows or self.adapts) + self.adapts)
        return 2 * (base + self.rank * (down + up))

    def passes(self, flows: bool) -> bool:
        """Whether a gradient comes to its output."""
        return flows or self.learns or self.adapts


@dataclass(frozen=True, slots=True)
class _Model:
    """The linears of a run's model. `*_learns`: the group's own weights do, its norms with them."""

    projector: tuple[_Linear, ...]
    qkv: _Linear
    proj: _Linear
    mlp: tuple[_Linear, ...]
    cross_q: _Linear
    cross_kv: _Linear
    cross_proj: _Linear
    output: _Linear
    llm_learns: bool
    xattn_learns: bool


def _model(config: Config) -> _Model:
    llm, stage, peft = config.llm, config.stage, config.peft
    q, kv, h = llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim, llm.hidden
    width = config.vision.hidden * config.vision.downsample**2
    learns = {group: group in stage.trainable and group not in config.adapted for group in ("llm", "xattn")}

    def linear(inputs: int, outputs: int, group: str) -> _Linear:
        if group not in config.adapted:
            return _Linear(inputs, outputs, learns[group])
        return _Linear(inputs, outputs, False, peft.rank, adapts=group in stage.trainable)

    inner = (width, h) if config.arch.name == "xattn" else (width, llm.ffn, h)
    return _Model(
        projector=tuple(_Linear(a, b, stage.train_projector) for a, b in zip(inner, inner[1:])),
        qkv=linear(h, q + 2 * kv, "llm"),
        proj=linear(q, h, "llm"),
        mlp=(linear(h, 2 * llm.ffn, "llm"), linear(llm.ffn, h, "llm")),
        cross_q=linear(h, q, "xattn"),
        cross_kv=linear(h, 2 * kv, "xattn"),
        cross_proj=linear(q, h, "xattn"),
        output=_Linear(h, llm.vocab, learns["llm"]),
        llm_learns=learns["llm"],
        xattn_learns=learns["xattn"],
    )


def _tile(vision: VisionConfig) -> int:
    """FLOPs of one tile's encoding."""
    d, patches = vision.hidden, (vision.tile_size // vision.patch) ** 2
    tokens = patches + 1  # and the class token
    layer = tokens * 2 * (4 * d * d + 2 * d * vision.ffn) + 4 * tokens**2 * d
    return 2 * patches * 3 * vision.patch**2 * d + vision.layers * layer


def _scores(config: Config, pairs: int) -> int:
    """Both products of one layer's attention."""
    return 4 * config.llm.heads * config.llm.head_dim * pairs


def forward(config: Config, work: Work) -> Flops:
    """Of a forward pass."""
    m, layers, carriers = _model(config), config.llm.layers, len(cross_layers(config))
    return Flops(
        vision=work.tiles * _tile(config.vision),
        projector=work.projected * _forward(m.projector),
        linears=work.tokens * layers * _forward((m.qkv, m.proj)),
        scores=layers * _scores(config, work.pairs),
        mlp=work.tokens * layers * _forward(m.mlp),
        cross_linears=carriers * (work.tokens * _forward((m.cross_q, m.cross_proj)) + work.keys * m.cross_kv.forward),
        cross_scores=carriers * _scores(config, work.cross_pairs),
        output=work.outputs * m.output.forward,
    )


def _forward(linears: Sequence[_Linear]) -> int:
    return sum(linear.forward for linear in linears)


def backward(config: Config, work: Work, whole: bool = False) -> Flops:
    """Of a backward pass. `whole`: gradients run down to the embedding whatever learns, as with recomputed layers."""
    m, stage, arch = _model(config), config.stage, config.arch.name
    # Features need no gradient, but the norm in front of the projector learns with it.
    projector = sum(linear.backward(flows=True) for linear in m.projector) if stage.train_projector else 0
    keys_flow = stage.train_projector or m.xattn_learns or (m.llm_learns and arch == "hybrid")  # tags are words
    flows = whole or m.llm_learns or (stage.train_projector and arch != "xattn")
    linears = scores = mlp = cross_linears = cross_scores = 0
    carriers = cross_layers(config)
    for number in range(1, config.llm.layers + 1):
        into = flows or m.llm_learns  # the norm in front learns with its group
        attended = m.qkv.passes(into)
        linears += work.tokens * (m.qkv.backward(into) + m.proj.backward(attended))
        scores += 2 * _scores(config, work.pairs) * attended
        flows |= m.proj.passes(attended)
        if number in carriers:
            into = flows or m.xattn_learns
            query, key = m.cross_q.passes(into), m.cross_kv.passes(keys_flow)
            cross_linears += work.tokens * (m.cross_q.backward(into) + m.cross_proj.backward(query or key))
            cross_linears += work.keys * m.cross_kv.backward(keys_flow)
            # Four products: the probabilities' gradient, the values', the queries', the keys'.
            cross_scores += ((query or key) + key + query + key) * _scores(config, work.cross_pairs) // 2
            flows |= m.cross_proj.passes(query or key) or m.xattn_learns  # the gate
        into = flows or m.llm_learns
        for linear in m.mlp:
            mlp += work.tokens * linear.backward(into)
            into = linear.passes(into)
        flows |= into
    return Flops(
        projector=work.projected * projector,
        linears=linears,
        scores=scores,
        mlp=mlp,
        cross_linears=cross_linears,
        cross_scores=cross_scores,
        output=work.outputs * m.output.backward(flows or m.llm_learns),
    )


def model_flops(config: Config, work: Work) -> Flops:
    """What training on `work` takes at least, however it is done: MFU is counted by it."""
    return forward(config, work) + backward(config, work)


# What is computed again, by train.recompute.
_AGAIN = {"none": (), "selective": ("mlp",), "full": ("linears", "scores", "mlp", "cross_linears", "cross_scores")}


def hardware_flops(config: Config, work: Work) -> Flops:
    """`model_flops` and what `train.recompute` adds. Padding counts where `work` holds it."""
    first, how = forward(config, work), config.train.recompute
    again = Flops(**{part: getattr(first, part) for part in _AGAIN[how]})
    return first + backward(config, work, whole=how != "none") + again
