"""Projected tiles take the place of the text stream's placeholders."""

from __future__ import annotations

from torch import Tensor, nn

from nvlm.batch import IMAGE, Batch


def fill(words_BSH: Tensor, tokens_BS: Tensor, tiles_TKH: Tensor) -> Tensor:
    """`words_BSH` with the placeholders of `tokens_BS` replaced by the tokens of `tiles_TKH`, in row-major order."""
    places_BS1 = (tokens_BS == IMAGE)[..., None]
    return words_BSH.masked_scatter(places_BS1, tiles_TKH.to(words_BSH.dtype))


class StreamFusion(nn.Module):
    """NVLM-D: all tiles in the stream, nothing cross-attended."""

    def stream(self, words_BSH: Tensor, batch: Batch, tiles_TKH: Tensor) -> Tensor:
        return fill(words_BSH, batch.tokens, tiles_TKH[batch.stream_tiles])

    def keys(self, batch: Batch, tiles_TKH: Tensor, embed) -> tuple[None, None]:
        return None, None
