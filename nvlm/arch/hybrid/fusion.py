"""Regular tiles become keys beside their tags."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.transformer import TransformerConfig
from torch import Tensor

from nvlm.arch.xattn.fusion import TileKeys, key_norm, place
from nvlm.data.batch import PAD, Batch


class TaggedTileKeys(TileKeys):
    """NVLM-H: keys are tags and tiles, each behind a norm of its own.

    `bind_tags`: each tile's tokens also get the mean embedding of their tag. Cross-attention has no order of its own,
    so a tag that merely stands beside a tile does not tell which tile it names. The norms bring word embeddings and
    projected tiles, which differ in scale by orders of magnitude in a real model, to one.
    """

    def __init__(self, config: TransformerConfig, bind_tags: bool) -> None:
        super().__init__(config)
        self.tag_norm = key_norm(config)
        self.bind_tags = bind_tags

    def forward(self, batch: Batch, project: Callable[[Tensor], Tensor], embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Keys [X, B, H]."""
        words_BXH = self.tag_norm(embed(batch.cross_tokens))
        tiles_TKH = self.tile_norm(project(batch.features_of(batch.on_host.cross_tiles)))
        if self.bind_tags and batch.cross_tags.numel():
            real_TL1 = (batch.cross_tags != PAD)[..., None]
            mean_TH = (embed(batch.cross_tags) * real_TL1).sum(1) / real_TL1.sum(1).clamp(min=1)
            tiles_TKH = tiles_TKH + self.tag_norm(mean_TH)[:, None, :]
        return place(words_BXH, tiles_TKH, batch)
