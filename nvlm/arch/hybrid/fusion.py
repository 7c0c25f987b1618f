"""Thumbnails fill the stream's placeholders, regular tiles become keys beside their tags."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nvlm.arch.decoder.fusion import fill
from nvlm.arch.xattn.fusion import keys
from nvlm.batch import Batch


@dataclass(frozen=True, slots=True)
class HybridFusion:
    """NVLM-H: both ways."""

    bind_tags: bool

    def stream(self, words_BSH: Tensor, batch: Batch, tiles_TKH: Tensor) -> Tensor:
        return fill(words_BSH, batch.tokens, tiles_TKH[batch.stream_tiles])

    def keys(self, batch: Batch, tiles_TKH: Tensor, embed) -> tuple[Tensor, Tensor]:
        return keys(batch, tiles_TKH, embed, self.bind_tags)
