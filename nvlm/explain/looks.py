"""How much of each tile's keys an answer used, as plain numbers: no torch.

Shapes: L gated layers, N answer tokens, T cross-attended tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

VERSION = 1
_DIGITS = 5  # of the numbers in a file


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the answer. `text` may be empty: a character can take several tokens. `probability`: what the model
    gave it, after the tokens before it."""

    text: str
    id: int
    probability: float


@dataclass(frozen=True, slots=True)
class Tile:
    """A cross-attended tile: number `tile` of image number `image`, both from 0; the thumbnail is an image's last."""

    image: int
    tile: int
    tag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """What the gated cross-attention of an answer's tokens read.

    A token's numbers are those of the column that predicts it. `grids`: (columns, rows) of tiles of each image;
    `layers`: numbers of the gated layers, from 1; `gates`: tanh of each layer's gate.

    `attention` [L, N, T]: the softmax's probabilities, summed over a tile's keys and averaged over heads. They sum to 1
    over the tiles. `tags` [L, N, T]: the part of it that fell on the tile's tag, if tags are keys (NVLM-H).
    `strength` [L, N, T]: the norm of what a tile's keys add to the residual stream, gate and output projection
    included, divided by the norm of the residual stream before it. (Kobayashi et al. 2020, "Attention is Not Only a
    Weight", measure single tokens in this way.)
    `effect` [N, T]: by how much the token's log-probability falls (nats) if the tile's keys are hidden from the whole
    text stream, while the answer stays the same.
    """

    arch: str
    tokens: tuple[Token, ...]
    grids: tuple[tuple[int, int], ...]
    tiles: tuple[Tile, ...]
    layers: tuple[int, ...]
    gates: np.ndarray
    attention: np.ndarray
    tags: np.ndarray
    strength: np.ndarray
    effect: np.ndarray

    @property
    def gated(self) -> np.ndarray:
        """[N, T]: `attention` averaged over layers, each weighted by the size of its gate; all zero if every gate is
        closed."""
        sizes_L = np.abs(self.gates)
        return np.tensordot(sizes_L / max(float(sizes_L.sum()), 1e-12), self.attention, axes=1)


def to_mapping(looks: Looks) -> dict[str, Any]:
    """`looks` for a JSON file."""
    lists = {name: getattr(looks, name).astype(float).round(_DIGITS).tolist() for name in _ARRAYS}
    return {
        "version": VERSION,
        "arch": looks.arch,
        "tokens": [{"text": one.text, "id": one.id, "probability": round(one.probability, 6)} for one in looks.tokens],
        "grids": [list(grid) for grid in looks.grids],
        "tiles": [{"image": one.image, "tile": one.tile, "tag": one.tag} for one in looks.tiles],
        "layers": list(looks.layers),
        **lists,
        "gated": looks.gated.astype(float).round(_DIGITS).tolist(),
    }


def from_mapping(values: Mapping[str, Any]) -> Looks:
    """What `to_mapping` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    if values["version"] != VERSION:
        raise ValueError(f"version {values['version']}, not {VERSION}")
    counts = [len(values[name]) for name in ("layers", "tokens", "tiles")]
    shapes = {"gates": counts[:1], "effect": counts[1:]}
    return Looks(
        arch=str(values["arch"]),
        tokens=tuple(Token(str(one["text"]), int(one["id"]), float(one["probability"])) for one in values["tokens"]),
        grids=tuple((int(columns), int(rows)) for columns, rows in values["grids"]),
        tiles=tuple(Tile(int(one["image"]), int(one["tile"]), str(one["tag"])) for one in values["tiles"]),
        layers=tuple(map(int, values["layers"])),
        **{name: np.array(values[name], dtype=float).reshape(shapes.get(name, counts)) for name in _ARRAYS},
    )


_ARRAYS = ("gates", "attention", "tags", "strength", "effect")
