"""What a model is made of, as values: linears, norms, attention products and the like, in the order of computation.

Architectures and encoders describe their modules with these. nvlm.estimate derives parameters, FLOPs and memory from
the descriptions, and tests compare them with the modules that are built. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A matrix product of each token. The weight is [outputs + padding, inputs].

    `learns`, `adapter` and `adapts` depend on the run: nvlm.estimate.model sets them.
    """

    name: str  # of the module, in the whole model or within its layer
    group: str  # module group
    inputs: int
    outputs: int
    split: Literal["outputs", "inputs"] | None = None  # what tensor-parallel ranks share out; None: whole on each
    bias: bool = False
    padding: int = 0  # rows of the weight that stand for no output
    shares: str | None = None  # the parameter that serves as its weight; None: it has its own
    reads_keys: bool = False  # its input is the cross-attended keys, not the tokens of its branch
    learns: bool = False
    adapter: int = 0  # rank of the adapter beside it; 0: none
    adapts: bool = False  # the adapter learns


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """An RMSNorm, or with `bias` a LayerNorm."""

    name: str
    group: str
    width: int
    bias: bool = False
    learns: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A tensor that belongs to no linear or norm: an embedding, positions, a gate, a layer scale."""

    name: str
    group: str
    size: int
    split: bool = False  # over tensor-parallel ranks
    factor: bool = False  # hidden states are multiplied with it
    learns: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """A pointwise function of `width` outputs. `gated`: it reads twice as many, as SwiGLU does."""

    width: int
    gated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Scaled dot-product attention of the linears in front of it."""

    heads: int
    kv_heads: int
    head_dim: int
    sees: Literal["causal", "keys", "all"]  # tokens before it in its sample, cross-attended keys, all tokens


Module = Linear | Norm | Parameter | Activation | Attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """The modules between a residual connection's two ends. Its linears may have adapters, and compute in FP8.

    `part`: where estimates count it. Only the MLP is recomputed by train.recompute=selective.
    """

    part: Literal["attention", "cross", "mlp"]
    modules: tuple[Module, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderModules:
    """A vision encoder: `embedding` of each tile's patches, then `layers` times `layer` on its tokens.

    `embedding` also lists what is computed once behind the layers, such as a final norm.
    """

    embedding: tuple[Module, ...]
    layer: tuple[Module, ...]
    layers: int
    patches: int  # of a tile
    tokens: int  # of a tile within the layers: patches and class token
    width: int  # of the residual stream
