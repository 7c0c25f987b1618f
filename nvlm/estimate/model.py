"""The list of a run's modules: linears, norms, parameters and attention, and which of them are trained.

Parameters, FLOPs, saved activations, memory, step time and the table of the dry run are all derived from it. It is
built from the configuration and the descriptions of the architecture and the encoder.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from nvlm.arch.description import Description, KeyKind
from nvlm.arch.registry import description
from nvlm.config.modules import Activation, Attention, Branch, EncoderModules, Linear, Module, Norm, Parameter
from nvlm.config.values import ArchConfig, Config, LLMConfig, VisionConfig
from nvlm.vision.encoders.registry import description_of

EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The modules of the whole model, in order of computation."""

    description: Description
    encoder: EncoderModules
    projector: tuple[Module, ...]  # applied to each tile token
    key_norms: dict[KeyKind, Norm]
    embedding: Parameter
    plain: tuple[Branch, ...]  # a decoder layer without cross-attention
    carrier: tuple[Branch, ...]  # a decoder layer with cross-attention
    carriers: frozenset[int]  # 0-based numbers of the layers with cross-attention
    head: tuple[Module, ...]  # final norm and output layer

    def layer(self, carries: bool) -> tuple[Branch, ...]:
        """The branches of a decoder layer, with or without cross-attention."""
        return self.carrier if carries else self.plain

    @property
    def encoder_learns(self) -> bool:
        """Whether the encoder is trained, so that features need gradients."""
        return any(map(learns, self.encoder.embedding))

    @property
    def keys_learn(self) -> bool:
        """Whether the keys need a gradient: for their norms, the projector, or the embeddings of tags."""
        of_words = self.description.tags_in_keys and self.embedding.learns
        of_tiles = self.description.tiles_in_keys and self.encoder_learns
        return of_words or of_tiles or any(map(learns, (*self.key_norms.values(), *self.projector)))

    @property
    def stream_learns(self) -> bool:
        """Whether anything before the first decoder layer is trained."""
        tiles = self.description.tiles_in_stream and (self.encoder_learns or any(map(learns, self.projector)))
        return self.embedding.learns or tiles


@dataclass(frozen=True, slots=True)
class _Learning:
    """The trained module groups, those with adapters of `rank`, and how both apply to a module."""

    trainable: Sequence[str]
    adapted: Sequence[str]
    rank: int

    def apart(self, modules: Iterable[Module]) -> tuple[Module, ...]:
        """`modules` outside layers, where no linear has an adapter."""
        return tuple(self._own(module) for module in modules)

    def within(self, branch: Branch) -> Branch:
        """A branch within a layer."""
        return replace(branch, modules=tuple(self._adapted(self._own(module)) for module in branch.modules))

    def _own(self, module: Module) -> Module:
        if isinstance(module, Activation | Attention):
            return module
        learns = module.group in self.trainable and module.group not in self.adapted
        return replace(module, learns=learns)

    def _adapted(self, module: Module) -> Module:
        if not isinstance(module, Linear) or module.group not in self.adapted:
            return module
        return replace(module, adapter=self.rank, adapts=module.group in self.trainable)


def model_of(config: Config) -> Model:
    """The modules of a run with `config`."""
    learning = _Learning(config.stage.trainable, config.adapted, config.peft.rank)
    return _model(config.arch, config.llm, config.vision, projector_modules(config), learning)


def projector_modules(config: Config) -> tuple[Module, ...]:
    """The modules of a run's projector."""
    kind = description(config.arch.name)
    return kind.projector_modules(config.projector, config.llm, config.vision, config.row_ends)


@functools.lru_cache(maxsize=16)  # a planner needs the same one thousands of times
def _model(
    arch: ArchConfig, llm: LLMConfig, vision: VisionConfig, projector: tuple[Module, ...], learning: _Learning
) -> Model:
    kind, every = description(arch.name), arch.cross_every
    first, last = learning.within(self_attention(llm)), learning.within(gated_mlp(llm))
    carried = [learning.within(branch) for branch in kind.carried(llm)]
    [embedding] = learning.apart([word_embedding(llm)])
    return Model(
        description=kind,
        encoder=_encoder(vision, learning),
        projector=learning.apart(projector),
        key_norms=dict(zip(kind.keys, learning.apart(kind.key_norms(llm)))),
        embedding=embedding,
        plain=(first, last),
        carrier=(first, *carried, last),
        carriers=frozenset(range(every - 1, llm.layers, every)) if every else frozenset(),
        head=learning.apart(head(llm)),
    )


def _encoder(vision: VisionConfig, learning: _Learning) -> EncoderModules:
    found = description_of(vision).modules(vision)
    return replace(found, embedding=learning.apart(found.embedding), layer=learning.apart(found.layer))


def word_embedding(llm: LLMConfig) -> Parameter:
    """The word embedding, including padding rows of the vocabulary."""
    return Parameter(name=EMBEDDING, group="llm", size=llm.padded_vocab * llm.hidden, split=True)


def self_attention(llm: LLMConfig) -> Branch:
    """A decoder layer's norm and self-attention."""
    h, q, kv, own = llm.hidden, llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim, dict(group="llm")
    qkv = dict(inputs=h, outputs=q + 2 * kv, split="outputs", bias=llm.qkv_bias)
    modules = (
        Norm(name="input_layernorm", width=h, **own),
        Linear(name="self_attention.linear_qkv", **qkv, **own),
        *(_head_norms(llm) if llm.qk_norm else ()),
        Attention(heads=llm.heads, kv_heads=llm.kv_heads, head_dim=llm.head_dim, sees="causal"),
        Linear(name="self_attention.linear_proj", inputs=q, outputs=h, split="inputs", **own),
    )
    return Branch(part="attention", modules=modules)


def _head_norms(llm: LLMConfig) -> Iterator[Norm]:
    for name, heads in (("q_layernorm", llm.heads), ("k_layernorm", llm.kv_heads)):
        yield Norm(name=f"self_attention.{name}", group="llm", width=llm.head_dim, heads=heads)


def gated_mlp(llm: LLMConfig) -> Branch:
    """A decoder layer's norm and MLP."""
    h, own = llm.hidden, dict(group="llm")
    modules = (
        Norm(name="pre_mlp_layernorm", width=h, **own),
        Linear(name="mlp.linear_fc1", inputs=h, outputs=2 * llm.ffn, split="outputs", **own),
        Activation(width=llm.ffn, gated=True),
        Linear(name="mlp.linear_fc2", inputs=llm.ffn, outputs=h, split="inputs", **own),
    )
    return Branch(part="mlp", modules=modules)


def head(llm: LLMConfig) -> tuple[Module, ...]:
    """The modules after the last layer."""
    rows = dict(outputs=llm.vocab, padding=llm.padded_vocab - llm.vocab, shares=EMBEDDING if llm.tied else None)
    return (
        Norm(name="decoder.final_layernorm", group="llm", width=llm.hidden),
        Linear(name="output_layer", group="llm", inputs=llm.hidden, split="outputs", **rows),
    )


def learns(module: Module) -> bool:
    """Whether the module's own weights are trained."""
    return not isinstance(module, Activation | Attention) and module.learns


def computes_in_fp8(config: Config, layer: int) -> bool:
    """Whether the linears of decoder layer `layer` (0-based) use FP8."""
    edges = config.precision.edges
    return config.precision.recipe is not None and edges <= layer < config.llm.layers - edges


def linears(modules: Iterable[Module]) -> list[Linear]:
    """The linears among `modules`."""
    return [module for module in modules if isinstance(module, Linear)]
