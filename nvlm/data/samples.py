"""Record -> Sample: the outline with pixels, a placeholder for each tile token, labels and visibility numbers.

The ranks of a replica divide a step's images: each has a seat, and decodes the images that fall to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from nvlm.data.batch import ALL_TILES, EVERYWHERE, IGNORE, IMAGE, OF_LATEST, PAD, Sample
from nvlm.data.images import decode_draft, decode_image
from nvlm.data.mapped import Rows
from nvlm.data.outline import Outline, Processor, outline
from nvlm.data.plans import Size
from nvlm.data.record import Record
from nvlm.data.video.clip import Video
from nvlm.data.video.decode import decode
from nvlm.tiling.grid import TilePlan
from nvlm.tiling.pixels import decode_jpeg, draft_size, tile_frames, tile_image
from nvlm.tiling.placement import Piece, Words


def encode(record: Record, processor: Processor, generate: bool = False) -> Sample:
    """Encode a conversation for training, or with `generate` as a prompt for its next turn. Raises BadRecord."""
    return fill(record, outline(record, processor, generate), processor)


def fill(record: Record, sketch: Outline, processor: Processor, share: Share | None = None) -> Sample:
    """`sketch`, the outline of `record`, with the pixels of `share`, by default all. Raises BadRecord."""
    share = share or whole(sketch)
    return _assemble(record.id, sketch, share, _tiles(record, sketch, processor, share), processor.sees)


def blank(name: str, sketch: Outline, processor: Processor, share: Share) -> Sample:
    """`sketch` with black tiles, for a record that cannot be decoded: every rank needs a sample of the planned size."""
    tiles = sum(plan.num_tiles for plan, seat in zip(sketch.pictures.plans, share.seats) if seat in share.here)
    return _assemble(name, sketch, share, _no_pixels(processor, tiles), processor.sees)


@dataclass(frozen=True, slots=True)
class Share:
    """Who decodes a record's images: the seat of each image, and the seat of this process."""

    seats: tuple[int, ...]
    own: int

    @property
    def here(self) -> tuple[int, int]:
        """Images of these seats are decoded by this process."""
        return (EVERYWHERE, self.own)


def whole(sketch: Outline) -> Share:
    """All images are decoded by every process."""
    return Share((EVERYWHERE,) * len(sketch.placements), 0)


def _tiles(record: Record, sketch: Outline, processor: Processor, share: Share) -> torch.Tensor:
    """uint8 [t, 3, px, px] for the images and videos of `share`, tiled as planned from their headers."""
    parts, pictures = [_no_pixels(processor)], sketch.pictures
    images = record.images[: len(pictures.plans)]  # those behind a document's cut are left out
    for source, size, plan, seat in zip(images, pictures.sizes, pictures.plans, share.seats, strict=True):
        if seat in share.here:
            parts.append(_tiles_of(source, size, plan, processor))
    return torch.cat(parts)


def _tiles_of(source: Any, size: Size, plan: TilePlan, processor: Processor) -> torch.Tensor:
    """uint8 [t, 3, px, px] of an image or a video."""
    if isinstance(source, Video):
        frames = decode(source, processor.max_pixels, processor.video, plan.num_tiles)
        return tile_frames(frames, plan, processor.resize)
    if processor.resize == "draft":
        image = decode_draft(source, processor.max_pixels, draft_size(plan), decode_jpeg, size)
    else:
        image = decode_image(source, processor.max_pixels, size)
    return tile_image(image, plan, processor.resize)


def _no_pixels(processor: Processor, tiles: int = 0) -> torch.Tensor:
    return torch.zeros(tiles, 3, processor.tile_size, processor.tile_size, dtype=torch.uint8)


def _assemble(name: str, sketch: Outline, share: Share, pixels: torch.Tensor, sees: str) -> Sample:
    placements = sketch.placements
    tile_tokens = [count for placement in placements for count in placement.tile_tokens]
    rows = [0, *accumulate(tile_tokens)]  # start of each tile's tokens, and the end of the last
    first_tile = [0, *accumulate(len(placement.tile_tokens) for placement in placements)]
    tokens: list[int] = []
    trained: list[bool] = []
    image_of: list[int] = []
    tile_of: list[int] = []
    stream_rows = [torch.zeros(0, dtype=torch.long)]
    numbers = Rows(rows, rows[-1])

    def add(ids: Sequence[int], learns: bool, image: int, tile: int) -> None:
        tokens.extend(ids)
        trained.extend([learns] * len(ids))
        image_of.extend([image] * len(ids))
        tile_of.extend([tile] * len(ids))

    def rows_of(image: int, piece: Piece) -> torch.Tensor:
        return numbers.of(piece.content, first_tile[image], piece.tile)

    latest, unbound = PAD, OF_LATEST if sees == "latest" else ALL_TILES
    for run in sketch.runs:
        if run.image is None:
            add(run.ids, run.trained, latest, unbound)
            continue
        latest = run.image
        for piece in placements[run.image].stream:
            stream_rows.append(rows_of(run.image, piece))
            add(_ids(piece), False, latest, piece.tile if piece.own_tile else unbound)

    cross = [(image, piece) for image, placement in enumerate(placements) for piece in placement.cross]
    tags = {(image, piece.tile): piece.content.ids for image, piece in cross if isinstance(piece.content, Words)}
    shown = [(image, piece) for image, piece in cross if piece.tiles]
    cross_rows = [torch.zeros(0, dtype=torch.long), *(rows_of(image, piece) for image, piece in shown)]
    sources, weights, largest = numbers.table()
    # The logits at t predict the token at t + 1, so labels are shifted left by one.
    labels = [tokens[t] if trained[t] else IGNORE for t in range(1, len(tokens))] + [IGNORE]

    def long(values) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.long)

    return Sample(
        id=name,
        tokens=long(tokens),
        labels=long(labels),
        image=long(image_of),
        tile=long(tile_of),
        stream_rows=torch.cat(stream_rows),
        cross_tokens=long(i for _, piece in cross for i in _ids(piece)),
        cross_image=long(i for i, piece in cross for _ in range(piece.length)),
        cross_tile=long(piece.tile for _, piece in cross for _ in range(piece.length)),
        cross_rows=torch.cat(cross_rows),
        cross_lengths=tuple(piece.length for _, piece in shown),
        cross_tags=tuple(tags.get((image, piece.tile), ()) for image, piece in shown),
        mixed_rows=sources,
        mixed_weights=weights,
        mixed_largest=largest,
        tile_tokens=long(tile_tokens),
        holder=long(seat for seat, one in zip(share.seats, placements) for _ in one.tile_tokens),
        pixels=pixels,
    )


def _ids(piece: Piece) -> Sequence[int]:
    return piece.content.ids if isinstance(piece.content, Words) else [IMAGE] * piece.length
