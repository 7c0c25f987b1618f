"""Which tokens of a sample's text stream see which of its tiles, by the rule that the model's kernels follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nvlm.attention.visibility import visible
from nvlm.data.batch import IMAGE, PAD, Sample


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive tokens with the same numbers. Of the stream: the latest image so far, and the only tile that they
    see; of the keys: the image and tile that they show. `first`: the position of the first one, `count`: how many;
    `tiles`: some of them are tile tokens."""

    image: int
    tile: int
    first: int
    count: int
    tiles: bool

    @property
    def before_images(self) -> bool:
        """Whether no image has begun."""
        return self.image == PAD

    @property
    def bound(self) -> bool:
        """Whether the tokens, of the stream, are a tag that is bound to its tile."""
        return self.tile >= 0


@dataclass(frozen=True, slots=True)
class Sight:
    """`seen[i][j]`: whether the tokens of `stream[i]` see the keys of `keys[j]`."""

    stream: tuple[Stretch, ...]
    keys: tuple[Stretch, ...]
    seen: tuple[tuple[bool, ...], ...]


def sight(sample: Sample) -> Sight:
    """Who sees whom in `sample`."""
    stream = _stretches(sample.tokens, sample.image, sample.tile)
    keys = _stretches(sample.cross_tokens, sample.cross_image, sample.cross_tile)
    queries, shown = _numbers(stream), _numbers(keys)
    seen = visible(torch.zeros_like(queries[0]), *queries, torch.zeros_like(shown[0]), *shown)
    return Sight(stream, keys, tuple(tuple(row) for row in seen.tolist()))


def _stretches(tokens: Tensor, image: Tensor, tile: Tensor) -> tuple[Stretch, ...]:
    if not len(tokens):
        return ()
    pairs, counts = torch.unique_consecutive(torch.stack([image, tile]), dim=1, return_counts=True)
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    filled = (tokens == IMAGE).tolist()
    return tuple(
        Stretch(*numbers, start, end - start, any(filled[start:end]))
        for numbers, start, end in zip(pairs.T.tolist(), starts, ends)
    )


def _numbers(stretches: tuple[Stretch, ...]) -> tuple[Tensor, Tensor]:
    """Image and tile numbers."""
    image, tile = ([getattr(one, name) for one in stretches] for name in ("image", "tile"))
    return torch.tensor(image, dtype=torch.long), torch.tensor(tile, dtype=torch.long)
