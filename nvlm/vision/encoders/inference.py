"""Encoders for inference alone, in few passes over memory: the same features as their Megatron modules, from the same
weights.

What can be computed once is computed when it is built. Layer scales are multiplied into the linears before them, so
that each bias is added by its product, and the rows of the qkv linear are in the order q | k | v, so that queries and
keys can be normalised where they are. Tokens come tile by tile, as attention reads and writes them. Each branch is
added to the residual in the function that normalises the sum; the last one is added at the end.

Shapes: T tiles, P patches, S tokens of a tile (class token, patches, padding), D encoder width, N heads, px tile side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from nvlm.attention.kernels.dense import ALL
from nvlm.config.values import VisionConfig
from nvlm.llm.norm import rms_norm
from nvlm.processes.device import compiled


@compiled
def add_rms_norm(hidden: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(hidden + branch, its RMSNorm)."""
    hidden = hidden + branch
    return hidden, rms_norm(hidden, weight, eps)


@compiled
def add_layer_norm(hidden: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(hidden + branch, its LayerNorm)."""
    hidden = hidden + branch
    return hidden, functional.layer_norm(hidden, weight.shape, weight, bias, eps)


@compiled
def norm_both(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The RMSNorms of queries and keys [..., D], which need not be contiguous; the weights are [D]."""
    return rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)


class FrozenEncoder(nn.Module):
    """Normalised pixels [T, 3, px, px] to patch features [T, P, D] of the last layer, without gradients.

    `encoder` has `patch_embedding` (a convolution), `position_embedding` (its last two dimensions are [S, D]), perhaps
    `class_embedding` (of D numbers), perhaps `embedding_norm`, which is applied to all tokens before the layers, and
    the layers in `decoder`. Its tensors are taken over; it is not usable afterwards.

    The number of tokens of a tile is padded to a multiple of `multiple`, once for all layers. Padding repeats the last
    patch, so that it changes no tensor's largest value; no token sees it.
    """

    def __init__(
        self,
        encoder: nn.Module,
        vision: VisionConfig,
        multiple: int = 1,
        activation: Callable[[Tensor], Tensor] = functional.gelu,
    ) -> None:
        super().__init__()
        embedding, position_SD = encoder.patch_embedding, encoder.position_embedding.data.flatten(0, -2)
        self.patch, self.side = vision.patch, vision.tile_size // vision.patch
        self.padding = -len(position_SD) % multiple
        self.patch_weight = fixed(embedding.weight.flatten(1))
        self.patch_bias = None if embedding.bias is None else fixed(embedding.bias)
        first = getattr(encoder, "class_embedding", None)
        self.class_embedding = None if first is None else fixed(first.view(1, 1, -1))
        self.position_embedding = fixed(torch.cat((position_SD, position_SD[-1:].expand(self.padding, -1))))
        norm = getattr(encoder, "embedding_norm", None)
        self.embedding_norm = None if norm is None else AddNorm(norm)
        layers = encoder.decoder.layers
        self.layers = nn.ModuleList(FrozenLayer(layer, vision, len(position_SD), activation) for layer in layers)

    def forward(self, pixels_T3: Tensor) -> Tensor:
        """[T, P, D], without the class token."""
        hidden_TSD, branch = self._tokens(pixels_T3), self.position_embedding
        if self.embedding_norm is not None:
            hidden_TSD = self.embedding_norm(hidden_TSD, branch)[1]
            branch = torch.zeros_like(branch)
        for layer in self.layers:
            hidden_TSD, branch = layer(hidden_TSD, branch)
        start = 0 if self.class_embedding is None else 1
        patches = slice(start, start + self.side**2)
        return hidden_TSD[:, patches] + branch[:, patches]

    def _tokens(self, pixels_T3: Tensor) -> Tensor:
        side, whole = self.side, self.side * self.patch
        pixels_T3 = pixels_T3[..., :whole, :whole].to(self.patch_weight.dtype)  # as a convolution does
        cells = pixels_T3.unflatten(2, (side, -1)).unflatten(4, (side, -1))
        cells_TPC = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        patches_TPD = functional.linear(cells_TPC, self.patch_weight, self.patch_bias)
        tokens = [patches_TPD, patches_TPD[:, -1:].expand(-1, self.padding, -1)]
        if self.class_embedding is not None:
            tokens = [self.class_embedding.expand(len(pixels_T3), -1, -1), *tokens]
        return torch.cat(tokens, dim=1)


class FrozenLayer(nn.Module):
    """A pre-norm layer; each of its branches may end with a layer scale."""

    def __init__(
        self, layer: nn.Module, vision: VisionConfig, tokens: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        attention, mlp = layer.self_attention, layer.mlp
        self.heads, self.tokens, self.eps, self.activation = vision.heads, tokens, vision.norm_eps, activation
        self.norm1, self.norm2 = AddNorm(layer.input_layernorm), AddNorm(layer.pre_mlp_layernorm)
        self.qkv = _linear(attention.linear_qkv)
        for tensor in self.qkv.parameters():
            by_head = tensor.unflatten(0, (vision.heads, 3, -1))
            tensor.copy_(by_head.transpose(0, 1).flatten(0, 2))
        self.qk_norm = nn.ParameterList()
        if vision.qk_norm:
            self.qk_norm.extend(fixed(norm.weight) for norm in (attention.q_layernorm, attention.k_layernorm))
        self.proj = _linear(attention.linear_proj, _scale_of(attention))
        self.fc1, self.fc2 = _linear(mlp.linear_fc1), _linear(mlp.linear_fc2, _scale_of(mlp))

    def forward(self, hidden_TSD: Tensor, branch_TSD: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden, the branch that is still to be added)."""
        hidden_TSD, normed_TSD = self.norm1(hidden_TSD, branch_TSD)
        attended_TSD = self._attend(self.qkv(normed_TSD))
        hidden_TSD, normed_TSD = self.norm2(hidden_TSD, self.proj(attended_TSD))
        return hidden_TSD, self.fc2(self.activation(self.fc1(normed_TSD)))

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        if len(self.qk_norm):
            q, k = norm_both(q, k, *self.qk_norm, self.eps)
        real = slice(self.tokens)
        qkv_TND = (x.unflatten(-1, (self.heads, -1)) for x in (q, k[:, real], v[:, real]))
        q_STND, k_XTND, v_XTND = (x.transpose(0, 1) for x in qkv_TND)
        return ALL.attend(q_STND, k_XTND, v_XTND).transpose(0, 1).contiguous()


class AddNorm(nn.Module):
    """(hidden, branch) to (their sum, its norm); `norm` is Megatron's, of which it takes the weights."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = fixed(norm.weight), norm.eps
        self.bias = fixed(norm.bias) if isinstance(norm, nn.LayerNorm) else None

    def forward(self, hidden: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        if self.bias is None:
            return add_rms_norm(hidden, branch, self.weight, self.eps)
        return add_layer_norm(hidden, branch, self.weight, self.bias, self.eps)


def fixed(tensor: Tensor) -> nn.Parameter:
    """`tensor` as a parameter without a gradient."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _scale_of(branch: nn.Module) -> Tensor | None:
    scale = getattr(branch, "layer_scale", None)
    return None if scale is None else scale.weight


@torch.no_grad()
def _linear(linear: nn.Module, scale: Tensor | None = None) -> nn.Linear:
    """torch's linear with the tensors of Megatron's, whose output `scale`, if given, multiplies."""
    weight, bias = linear.weight.data, None if linear.bias is None else linear.bias.data
    if scale is not None:
        weight.mul_(scale[:, None])
        bias.mul_(scale)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight, made.bias = fixed(weight), None if bias is None else fixed(bias)
    return made
