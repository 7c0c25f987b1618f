"""Fewer tokens per tile before the projector. Shapes: T tiles, P patches of a square grid, D encoder width."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from nvlm.tiling.grid import pooled_side

MAPS = ("average", "max", "bilinear")  # poolings that keep a token's width


def pooled(features_TPD: Tensor, factor: int, pool: str = "concat", pads: bool = False) -> Tensor:
    """One token for each block of `factor` x `factor` patches; `pool` and `pads` as in `nvlm.tiling.grid.pooled_side`.

    concat: NVLM's pixel shuffle and VILA's `mlp_downsample` (with `pads`). average, max, bilinear: `get_2dPool` of
    LLaVA-NeXT, with `mm_spatial_pool_stride` as factor; bilinear is `apply_pooling` of transformers' LLaVA-OneVision.
    Raises ValueError if the patches are no square, or `factor` does not fit.
    """
    if factor == 1:
        return features_TPD
    side = _side(features_TPD)
    to = pooled_side(side, factor, pool, pads)
    if pool == "concat":
        return pixel_shuffle(_filled_up(features_TPD, side, to * factor), factor)
    map_TDhw = features_TPD.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    match pool:
        case "average":
            map_TDhw = functional.avg_pool2d(map_TDhw, factor)
        case "max":
            map_TDhw = functional.max_pool2d(map_TDhw, factor)
        case "bilinear":
            map_TDhw = functional.interpolate(map_TDhw, size=(to, to), mode="bilinear")
    return map_TDhw.permute(0, 2, 3, 1).flatten(1, 2)


def pooled_to(features_TPD: Tensor, tokens: int, pool: str) -> Tensor:
    """`features_TPD` with `tokens` tokens per tile, by the smallest blocks that `pool` makes so many of: average, max
    or bilinear. Raises ValueError if none does."""
    if (patches := features_TPD.shape[1]) == tokens:
        return features_TPD
    side = _side(features_TPD)
    fitting = [f for f in range(2, side + 1) if pooled_side(side, f, pool) ** 2 == tokens] if pool in MAPS else []
    if not fitting:
        fix = "the encoder and vision.tile_size, patch, downsample and pool disagree"
        raise ValueError(f"features of a tile: got {patches} tokens, expected {tokens}. Fix: {fix}")
    return pooled(features_TPD, fitting[0], pool)


def by_columns(tokens_TKC: Tensor) -> Tensor:
    """The tokens of square grids, which stand row by row, column by column: VILA's `DownSampleBlock` leaves them so."""
    side = _side(tokens_TKC)
    return tokens_TKC.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)


def pixel_shuffle(features_TPD: Tensor, factor: int = 2) -> Tensor:
    """[T, P, D] to [T, P / factor^2, D * factor^2]: each factor x factor block of patches becomes one token.

    Output token (R, C) holds the patches (2R, 2C), (2R, 2C + 1), (2R + 1, 2C), (2R + 1, 2C + 1), in this order: pixel
    shuffle, version v2 (NVLM section 4.1; InternVL's `ps_version`).
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


def _side(features_TPD: Tensor) -> int:
    patches = features_TPD.shape[1]
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"pooling, got {patches} patches, expected a square grid, fix: pool before other changes")
    return side


def _filled_up(features_TPD: Tensor, side: int, to: int) -> Tensor:
    """The grid with zeros at the right and at the bottom, `to` x `to`."""
    if to == side:
        return features_TPD
    grid_ThwD = features_TPD.unflatten(1, (side, side))
    return functional.pad(grid_ThwD, (0, 0, 0, to - side, 0, to - side)).flatten(1, 2)
