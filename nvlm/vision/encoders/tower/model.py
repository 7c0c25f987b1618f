"""A vision tower in Megatron-Core modules: pre-norm layers with LayerNorm and biases, no final norm.

Shapes: T tiles, P patches, S tokens of a tile (patches, perhaps a class token), D encoder width, px tile side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from nvlm.config.values import Config
from nvlm.llm.norm import LayerNorm
from nvlm.vision.encoders.layers import build_layers, encoder_config, layer_spec
from nvlm.vision.encoders.tower.describe import Tower


class VisionTower(MegatronModule):
    """Normalised pixels [T, 3, px, px] to patch features [T, P, D] of the last layer that `config` asks for.

    Pixels at the right and at the bottom that fill no patch are not seen: of 384 px with patches of 14, 6 are not.
    """

    def __init__(
        self, tower: Tower, config: Config, groups: ProcessGroupCollection, activation: Callable[[Tensor], Tensor]
    ) -> None:
        vision, described = config.vision, encoder_config(config, activation)
        super().__init__(config=described)
        d, patch, dtype = vision.hidden, vision.patch, described.params_dtype
        self.patch_embedding = nn.Conv2d(3, d, patch, patch, bias=tower.patch_bias, dtype=dtype)
        first = torch.randn(d, dtype=dtype) * 0.02 if tower.class_token else None
        self.class_embedding = None if first is None else nn.Parameter(first)
        tokens = vision.patches + tower.class_token
        self.position_embedding = nn.Parameter(torch.randn(tokens, d, dtype=dtype) * 0.02)
        self.embedding_norm = LayerNorm(described, d, vision.norm_eps) if tower.embedding_norm else None
        self.decoder = build_layers(described, layer_spec(vision), groups)

    def forward(self, pixels_T3: Tensor) -> Tensor:
        """[T, P, D], without the class token."""
        tokens_TSD = self.patch_embedding(pixels_T3.to(self.config.params_dtype)).flatten(2).transpose(1, 2)
        patches = tokens_TSD.shape[1]
        if self.class_embedding is not None:
            first_T1D = self.class_embedding.expand(len(tokens_TSD), 1, -1)
            tokens_TSD = torch.cat((first_T1D, tokens_TSD), dim=1)
        tokens_TSD = tokens_TSD + self.position_embedding
        if self.embedding_norm is not None:
            tokens_TSD = self.embedding_norm(tokens_TSD)
        hidden_STD = self.decoder(tokens_TSD.transpose(0, 1).contiguous(), attention_mask=None)
        return hidden_STD[-patches:].transpose(0, 1)
