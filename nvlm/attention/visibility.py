"""Who sees what: the rules, and the dense masks that follow from them.

Shapes: S queries, X keys, B rows, L columns of a row.
"""

from __future__ import annotations

from torch import Tensor

from nvlm.data.batch import ALL_TILES, PAD, Batch


def follows(sample_q: Tensor, column_q: Tensor, sample_k: Tensor, column_k: Tensor) -> Tensor:
    """Whether a token may look at another: not ahead, not into another sample, not at padding. Elementwise."""
    return (sample_q == sample_k) & (sample_k != PAD) & (column_k <= column_q)


def sees(
    sample_q: Tensor, image_q: Tensor, tile_q: Tensor, sample_k: Tensor, image_k: Tensor, tile_k: Tensor
) -> Tensor:
    """Whether a token may look at a key. Elementwise.

    A query sees the keys of its own sample's images up to the last one begun; a query bound to a tile (a tile tag
    of NVLM-X, section 4.3) sees that tile of that image alone.
    """
    before = (sample_q == sample_k) & (sample_k != PAD) & (image_k <= image_q)
    own = (image_k == image_q) & (tile_k == tile_q)
    return before & ((tile_q == ALL_TILES) | own)


def causal_mask(sample_BL: Tensor, queries_S: Tensor, keys_X: Tensor) -> Tensor:
    """[B, 1, S, X], True where a token must not look (`follows`).

    `sample_BL` are whole rows; `queries_S` and `keys_X` the columns of them that look and are looked at.
    """
    sample_q, sample_k = sample_BL[:, queries_S, None], sample_BL[:, None, keys_X]
    return ~follows(sample_q, queries_S[:, None], sample_k, keys_X)[:, None]


def visible(
    sample_q: Tensor, image_q: Tensor, tile_q: Tensor, sample_k: Tensor, image_k: Tensor, tile_k: Tensor
) -> Tensor:
    """Who sees what (`sees`): [..., S, X], from the numbers [..., S] of queries and [..., X] of keys."""
    queries = (numbers[..., :, None] for numbers in (sample_q, image_q, tile_q))
    keys = (numbers[..., None, :] for numbers in (sample_k, image_k, tile_k))
    return sees(*queries, *keys)


def unseen_keys(batch: Batch, columns_S: Tensor) -> Tensor:
    """[B, 1, S, X], True where a token in one of the columns `columns_S` must not look at a key."""
    queries = (numbers[:, columns_S] for numbers in (batch.sample, batch.image, batch.tile))
    return ~visible(*queries, batch.cross_sample, batch.cross_image, batch.cross_tile)[:, None]
