"""The row numbers of a feature map's tokens, and of the tokens that they are mixed from.

Shapes: R rows and C columns of tokens, M mixed tokens, each of four tile tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nvlm.data.batch import ROW_END
from nvlm.tiling.placement import Content, RowEnd, TileMap, Words
from nvlm.tiling.resample import Resampling, taps


@dataclass(slots=True)
class Rows:
    """Row numbers of a sample's placeholders, of which those from `first_mixed` on are mixed tokens."""

    starts: Sequence[int]  # the row of the first token of each of the sample's tiles
    first_mixed: int
    sources: list[Tensor] = field(default_factory=list)  # [m, 4] rows of tile tokens, of each mixed map
    weights: list[Tensor] = field(default_factory=list)  # [m, 4]
    largest: list[Tensor] = field(default_factory=list)  # [m], whether the largest of the four counts, not their sum

    def of(self, content: Content, first_tile: int, tile: int) -> Tensor:
        """The row numbers of the content of a piece; `first_tile`: the number of its image's first tile."""
        match content:
            case Words():
                return torch.zeros(0, dtype=torch.long)
            case RowEnd():
                return torch.full((1,), ROW_END)
            case TileMap():
                rows_RC = self._mixed(_window(content, self.starts, first_tile), content.resampled)
                ends_RC = torch.full((len(rows_RC), int(content.row_ends)), ROW_END)
                return torch.cat((rows_RC, ends_RC), dim=1).flatten()
        return torch.arange(content.length) + self.starts[first_tile + tile]

    def _mixed(self, rows_RC: Tensor, new: Resampling | None) -> Tensor:
        if new is None:
            return rows_RC
        down, across = (taps(count, size, new.kind) for count, size in zip(rows_RC.shape, new.size))
        (y_R2, wy_R2), (x_C2, wx_C2) = (map(torch.tensor, zip(*side)) for side in (down, across))
        sources = rows_RC[y_R2[:, None, :, None], x_C2[None, :, None, :]].reshape(-1, 4)
        weights = (wy_R2[:, None, :, None] * wx_C2[None, :, None, :]).reshape(-1, 4)
        first = self.first_mixed + sum(map(len, self.sources))
        self.sources.append(sources)
        self.weights.append(weights)
        self.largest.append(torch.full((len(sources),), new.kind == "max"))
        return torch.arange(first, first + len(sources)).view(new.size)

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sources [M, 4], weights [M, 4] and whether the largest counts [M], of all mixed tokens so far."""
        empty = (torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool))
        parts = zip(empty, (self.sources, self.weights, self.largest))
        return tuple(torch.cat((nothing, *some)) for nothing, some in parts)


def _window(content: TileMap, starts: Sequence[int], first_tile: int) -> Tensor:
    """Rows [R, C] of the tile tokens in a map's window."""
    top, left, bottom, right = content.kept
    y_R1, x_C = torch.arange(top, bottom)[:, None], torch.arange(left, right)
    own = torch.tensor([starts[first_tile + tile] for tile in content.tiles])
    tile_RC = y_R1 // content.rows * content.across + x_C // content.columns
    return own[tile_RC] + y_R1 % content.rows * content.columns + x_C % content.columns
