"""Descriptions of a model's modules as values: linears, norms, attention and so on, in order of computation.

Architectures and encoders describe their modules with these. nvlm.estimate derives parameters, FLOPs and memory from
the descriptions, and tests compare them with the real modules. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A matrix product per token. The weight is [outputs + padding, inputs].

    `learns`, `adapter` and `adapts` depend on the run: nvlm.estimate.model sets them.
    """

    name: str  # of the module, in the unsplit model or within its layer
    group: str  # module group
    inputs: int
    outputs: int
    split: Literal["outputs", "inputs"] | None = None  # dimension split over tensor-parallel ranks; None: replicated
    bias: bool = False
    padding: int = 0  # padding rows of the weight
    shares: str | None = None  # the parameter that it uses as its weight; None: its own
    reads_keys: bool = False  # its inputs are the cross-attended keys, not the tokens
    learns: bool = False
    adapter: int = 0  # rank of its adapter; 0: none
    adapts: bool = False  # the adapter is trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """An RMSNorm, or with `bias` a LayerNorm. `heads`: applied to each of so many heads of `width`."""

    name: str
    group: str
    width: int
    bias: bool = False
    heads: int = 0  # split over tensor-parallel ranks; 0: it is applied to the whole hidden state
    learns: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A tensor outside linears and norms: an embedding, positions, a gate, a layer scale."""

    name: str
    group: str
    size: int
    split: bool = False  # over tensor-parallel ranks
    factor: bool = False  # multiplies hidden states
    learns: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """A pointwise function with `width` outputs. `gated`: with twice as many inputs, as in SwiGLU."""

    width: int
    gated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Scaled dot-product attention on the outputs of the linears before it."""

    heads: int
    kv_heads: int
    head_dim: int
    sees: Literal["causal", "keys", "all"]  # earlier tokens of the sample, cross-attended keys, all tokens


Module = Linear | Norm | Parameter | Activation | Attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """The modules of one residual branch. Its linears may have adapters and may use FP8.

    `part`: how estimates count it. train.recompute=selective recomputes only the MLP.
    """

    part: Literal["attention", "cross", "mlp"]
    modules: tuple[Module, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderModules:
    """A vision encoder: `embedding` of each tile's patches, then `layers` times `layer` on the tokens.

    `embedding` also lists modules that are applied once after the layers, such as a final norm.
    """

    embedding: tuple[Module, ...]
    layer: tuple[Module, ...]
    layers: int
    patches: int  # per tile
    tokens: int  # per tile within the layers: patches and class token
    width: int  # of the residual stream
