"""Thumbnails fill the stream's placeholders, regular tiles become keys beside their tags."""

from __future__ import annotations

from torch import Tensor

from nvlm.arch.decoder.fusion import fill
from nvlm.arch.xattn.fusion import TaggedFusion
from nvlm.batch import Batch


class HybridFusion(TaggedFusion):
    """NVLM-H: both ways."""

    def stream(self, words_BSH: Tensor, batch: Batch, tiles_TKH: Tensor) -> Tensor:
        return fill(words_BSH, batch.tokens, tiles_TKH[batch.stream_tiles])
