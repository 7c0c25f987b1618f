"""Fewer, wider tokens: pixel shuffle, version v2 (NVLM section 4.1; InternVL's `ps_version`)."""

from __future__ import annotations

from torch import Tensor


def pixel_shuffle(features_TPD: Tensor, factor: int = 2) -> Tensor:
    """[T, P, D] to [T, P / factor^2, D * factor^2]: each factor x factor block of patches becomes one token.

    Output token (R, C) holds the patches (2R, 2C), (2R, 2C + 1), (2R + 1, 2C), (2R + 1, 2C + 1), in this order.
    """
    tiles, patches, width = features_TPD.shape
    side = round(patches**0.5)
    if side * side != patches or side % factor:
        raise ValueError(
            f"pixel_shuffle: got {patches} patches, expected a square grid with sides divisible by {factor}"
        )
    cells = side // factor
    blocks = features_TPD.view(tiles, cells, factor, cells, factor, width).transpose(2, 3)
    return blocks.reshape(tiles, cells * cells, factor * factor * width)
