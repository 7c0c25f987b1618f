"""The one list of a run's modules: linears, norms, parameters and attention products, with what learns of them.

Parameters, FLOPs, kept activations, memory, step time and the dry run's table are all derived from it. It is made from
the configuration and from the descriptions of the architecture and of the encoder.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nvlm.arch.description import Description, KeyKind
from nvlm.arch.registry import description
from nvlm.config.modules import Activation, Attention, Branch, EncoderModules, Linear, Module, Norm, Parameter
from nvlm.config.values import ArchConfig, Config, LLMConfig, VisionConfig
from nvlm.vision.encoders.registry import description_of

EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The modules of the whole model, in the order of computation."""

    description: Description
    encoder: EncoderModules
    projector: tuple[Module, ...]  # of each tile's token
    key_norms: dict[KeyKind, Norm]
    embedding: Parameter
    plain: tuple[Branch, ...]  # of a decoder layer without cross-attention
    carrier: tuple[Branch, ...]  # of one with it
    carriers: frozenset[int]  # numbers of the layers with it, from 0
    head: tuple[Module, ...]  # final norm and output layer

    def layer(self, carries: bool) -> tuple[Branch, ...]:
        """The branches of a decoder layer, with cross-attention or without."""
        return self.carrier if carries else self.plain

    @property
    def keys_learn(self) -> bool:
        """Whether a gradient reaches the cross-attended keys: from their norms, the projector, or tags' embeddings."""
        of_words = self.description.tags_in_keys and self.embedding.learns
        return of_words or any(map(learns, (*self.key_norms.values(), *self.projector)))

    @property
    def stream_learns(self) -> bool:
        """Whether anything learns in front of the first decoder layer."""
        tiles = self.description.tiles_in_stream and any(map(learns, self.projector))
        return self.embedding.learns or tiles


@dataclass(frozen=True, slots=True)
class _Learning:
    """Module groups that learn, those whose layers have adapters of `rank`, and what follows for a module."""

    trainable: Sequence[str]
    adapted: Sequence[str]
    rank: int

    def apart(self, modules: Iterable[Module]) -> tuple[Module, ...]:
        """`modules` that stand outside layers, where no linear has an adapter."""
        return tuple(self._own(module) for module in modules)

    def within(self, branch: Branch) -> Branch:
        """A layer's branch."""
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
    return _model(config.arch, config.llm, config.vision, config.stage.trainable, config.adapted, config.peft.rank)


@functools.lru_cache(maxsize=16)  # a planner asks for the same one thousands of times
def _model(
    arch: ArchConfig, llm: LLMConfig, vision: VisionConfig, trainable: Sequence[str], adapted: Sequence[str], rank: int
) -> Model:
    kind, every, learning = description(arch.name), arch.cross_every, _Learning(trainable, adapted, rank)
    first, last = learning.within(self_attention(llm)), learning.within(gated_mlp(llm))
    carried = [learning.within(branch) for branch in kind.carried(llm)]
    [embedding] = learning.apart([word_embedding(llm)])
    return Model(
        description=kind,
        encoder=description_of(vision).modules(vision),
        projector=learning.apart(kind.projector_modules(llm, vision)),
        key_norms=dict(zip(kind.keys, learning.apart(kind.key_norms(llm)))),
        embedding=embedding,
        plain=(first, last),
        carrier=(first, *carried, last),
        carriers=frozenset(range(every - 1, llm.layers, every)) if every else frozenset(),
        head=learning.apart(head(llm)),
    )


def word_embedding(llm: LLMConfig) -> Parameter:
    """The rows of the words' embedding, with those that pad the vocabulary."""
    return Parameter(name=EMBEDDING, group="llm", size=llm.padded_vocab * llm.hidden, split=True)


def self_attention(llm: LLMConfig) -> Branch:
    """A decoder layer's self-attention behind its norm."""
    h, q, kv, own = llm.hidden, llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim, dict(group="llm")
    qkv = dict(inputs=h, outputs=q + 2 * kv, split="outputs", bias=llm.qkv_bias)
    modules = (
        Norm(name="input_layernorm", width=h, **own),
        Linear(name="self_attention.linear_qkv", **qkv, **own),
        Attention(heads=llm.heads, kv_heads=llm.kv_heads, head_dim=llm.head_dim, sees="causal"),
        Linear(name="self_attention.linear_proj", inputs=q, outputs=h, split="inputs", **own),
    )
    return Branch(part="attention", modules=modules)


def gated_mlp(llm: LLMConfig) -> Branch:
    """A decoder layer's MLP behind its norm."""
    h, own = llm.hidden, dict(group="llm")
    modules = (
        Norm(name="pre_mlp_layernorm", width=h, **own),
        Linear(name="mlp.linear_fc1", inputs=h, outputs=2 * llm.ffn, split="outputs", **own),
        Activation(width=llm.ffn, gated=True),
        Linear(name="mlp.linear_fc2", inputs=llm.ffn, outputs=h, split="inputs", **own),
    )
    return Branch(part="mlp", modules=modules)


def head(llm: LLMConfig) -> tuple[Module, ...]:
    """What stands behind the last layer."""
    rows = dict(outputs=llm.vocab, padding=llm.padded_vocab - llm.vocab, shares=EMBEDDING if llm.tied else None)
    return (
        Norm(name="decoder.final_layernorm", group="llm", width=llm.hidden),
        Linear(name="output_layer", group="llm", inputs=llm.hidden, split="outputs", **rows),
    )


def learns(module: Module) -> bool:
    """Whether the module's own weights learn."""
    return not isinstance(module, Activation | Attention) and module.learns


def computes_in_fp8(config: Config, layer: int) -> bool:
    """Whether the linears of decoder layer `layer` (from 0) do."""
    edges = config.precision.edges
    return config.precision.recipe is not None and edges <= layer < config.llm.layers - edges


def linears(modules: Iterable[Module]) -> list[Linear]:
    """Those of `modules` that are linears."""
    return [module for module in modules if isinstance(module, Linear)]
