"""The visibility rules, and dense masks made from them.

Shapes: S queries, X keys, B rows, L columns of a row.
"""

from __future__ import annotations

from torch import Tensor

from nvlm.data.batch import ALL_TILES, OF_LATEST, PAD, Batch


def follows(sample_q: Tensor, column_q: Tensor, sample_k: Tensor, column_k: Tensor) -> Tensor:
    """Whether a query token may attend to a key token: same sample, not later, not padding. Elementwise."""
    return (sample_q == sample_k) & (sample_k != PAD) & (column_k <= column_q)


def sees(
    sample_q: Tensor, image_q: Tensor, tile_q: Tensor, sample_k: Tensor, image_k: Tensor, tile_k: Tensor
) -> Tensor:
    """Whether a token may attend to a cross-attention key. Elementwise.

    A query sees the keys of its sample's images up to and including the latest one started, or of that one alone
    (`arch.sees=latest`, as in Flamingo, section 2.4); a query bound to a tile (a tile tag of NVLM-X, section 4.3) sees
    only that tile of that image.
    """
    before = (sample_q == sample_k) & (sample_k != PAD) & (image_k <= image_q)
    own = (image_k == image_q) & ((tile_q == OF_LATEST) | (tile_k == tile_q))
    return before & ((tile_q == ALL_TILES) | own)


def causal_mask(sample_BL: Tensor, queries_S: Tensor, keys_X: Tensor) -> Tensor:
    """[B, 1, S, X], True where attention is forbidden (see `follows`).

    `sample_BL` covers whole rows; `queries_S` and `keys_X` are the columns of the queries and keys.
    """
    sample_q, sample_k = sample_BL[:, queries_S, None], sample_BL[:, None, keys_X]
    return ~follows(sample_q, queries_S[:, None], sample_k, keys_X)[:, None]


def visible(
    sample_q: Tensor, image_q: Tensor, tile_q: Tensor, sample_k: Tensor, image_k: Tensor, tile_k: Tensor
) -> Tensor:
    """`sees` for all pairs: [..., S, X], from the numbers [..., S] of queries and [..., X] of keys."""
    queries = (numbers[..., :, None] for numbers in (sample_q, image_q, tile_q))
    keys = (numbers[..., None, :] for numbers in (sample_k, image_k, tile_k))
    return sees(*queries, *keys)


def unseen_keys(batch: Batch, columns_S: Tensor) -> Tensor:
    """[B, 1, S, X], True where a token in `columns_S` must not attend to a key."""
    queries = (numbers[:, columns_S] for numbers in (batch.sample, batch.image, batch.tile))
    return ~visible(*queries, batch.cross_sample, batch.cross_image, batch.cross_tile)[:, None]
